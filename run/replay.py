"""Repeating a training step whose loss or gradient was not finite, and saying where it is not.

A replay file is a checkpoint from before the step, with the step's episodes: python run/run.py --replay FILE
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from episodes.bad_clips import BadClips
from run.checkpoints import TrainingState
from run.main_run import Learner
from run.meter import Meter
from run.solver import Solver
from utils import distributed
from utils.checkpoint import load_checkpoint, load_weights
from utils.config import config_from_dict
from utils.errors import UserError
from utils.weights import not_finite

MOST_PARAMETERS_SHOWN = 20


def replay(path: Path, overrides: Sequence[str]) -> list[str]:
    """Computes the gradient of the saved step again, and changes nothing; returns what to print.

    Args:
        path: of the file that the run wrote when it stopped.
        overrides: KEY=VALUE, for what is elsewhere or otherwise now (DATA.DATA_DIR, DEVICE.DEVICE).

    Raises:
        UserError: no such file, or no replay in it; or several processes.
    """
    if distributed.world_size() > 1:
        raise UserError("a step is replayed by one process: start run/run.py --replay without torchrun")
    content = load_checkpoint(path, "a run wrote whose loss was not finite (replay_<episode>.pt)")
    try:
        trained_with, stored = content["config"], content["replay"]
        videos_of_episodes = [list(map(str, videos)) for videos in stored["videos"]]
        group = range(stored["episodes"][0], stored["episodes"][0] + len(videos_of_episodes))
        if not group or group.start < 0:
            raise ValueError(group)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: holds no step to replay; use a replay_<episode>.pt that a training run wrote"
        ) from error
    fixed = ["DATA.CHECK_VIDEOS=false", "TEST.ONLY_TEST=false"]
    config = config_from_dict(trained_with, str(path), overrides=[*fixed, *overrides])
    learner = Learner(config)
    # A step that is not finite may have ruined the running statistics of a batch norm too, which training never reads.
    load_weights(learner.model, content["model"], path, must_be_finite=False)
    solver, bad_clips = Solver(learner.model, config.SOLVER, 1), BadClips(config.DATA.MAX_BAD_CLIPS)
    step = learner.training_step(TrainingState(learner.model, solver, Meter(learner.device), bad_clips))
    episodes = learner.training_episodes(group)
    learner.model.train()  # not before: cached features are made in evaluation mode
    lines = [f"{path}: the step of training episodes {group.start} to {group[-1]}, seed {config.MODEL.SEED}"]
    if ruined := not_finite(content["model"]):
        lines += [f"weights or running statistics in it that are not finite ({len(ruined)}):", *_some(ruined)]
    for episode, videos in zip(episodes, videos_of_episodes, strict=True):
        output, _ = step.add_gradient(episode, len(episodes))
        terms = ", ".join(f"{name} {value.item():g}" for name, value in output.losses.items())
        lines.append(f"episode {episode.index}: loss {output.total.item():g} ({terms})")
        if not output.total.isfinite():
            lines += [f"  {video}" for video in videos]
    return lines + _gradient_lines(learner.model)


def _gradient_lines(model: torch.nn.Module) -> list[str]:
    """Which parameters' gradients are not finite, and the largest one of those that are."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    largest = {name: gradient.abs().max().item() for name, gradient in gradients.items() if name not in broken}
    lines = [f"the gradients of {len(broken)} of {len(gradients)} parameters are not finite" + (":" if broken else "")]
    lines += _some(broken)
    if largest:
        name = max(largest, key=lambda key: largest[key])
        lines.append(f"the largest finite entry of a gradient is {largest[name]:g}, in {name}")
    return lines


def _some(names: list[str]) -> list[str]:
    """A line for each of the names, or for the first of many."""
    more = len(names) - MOST_PARAMETERS_SHOWN
    return [f"  {name}" for name in names[:MOST_PARAMETERS_SHOWN]] + ([f"  ... and {more} more"] if more > 0 else [])
