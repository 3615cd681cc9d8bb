"""`run.py --replay FILE`: repeats a training step with NaN or inf in the loss or gradient, and shows where they are.

A replay file contains a checkpoint from before the step, and the step's episodes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run.main_run import Learner
from run.run_directory import TrainingState
from utils import distributed
from utils.checkpoint import load_checkpoint, load_weights
from utils.config import config_from_dict
from utils.errors import UserError, first_of
from utils.weights import not_finite

MAX_SHOWN = 20  # names of weights or videos


def replay(path: Path, overrides: Sequence[str]) -> list[str]:
    """Computes the gradient of the saved step again, without changing anything; returns the lines to print.

    Args:
        path: the file that the run wrote when it stopped.
        overrides: KEY=VALUE, for another data folder or device (DATA.DATA_DIR, DEVICE.DEVICE).

    Raises:
        UserError: the file is missing or is not a replay file, or there are several processes.
    """
    if distributed.world_size() > 1:
        raise UserError("--replay uses one process: start run/run.py --replay without torchrun")
    content = load_checkpoint(path, "a run wrote when its loss was not finite (replay_<episode>.pt)")
    group, videos_of = saved_step(content, path)
    fixed = ["DATA.CHECK_VIDEOS=false", "TEST.ONLY_TEST=false"]
    config = config_from_dict(content["config"], str(path), overrides=[*fixed, *overrides])
    learner = Learner(config)
    model = learner.model
    # A step with NaN or inf may also have ruined the running statistics of batch norms, which training does not read.
    load_weights(model, content["model"], path, must_be_finite=False)
    state = TrainingState.new(model, learner.device, config)
    state.cached_in = content.get("cached_in")  # older files have no such entry
    step = learner.training_step(state)
    episodes = learner.training_episodes(group, state)
    model.train()  # only here, because cached features are computed in evaluation mode
    lines = [f"{path}: the step of training episodes {group[0]} to {group[-1]}, seed {config.MODEL.SEED}"]
    if ruined := not_finite(content["model"]):
        lines += [f"weights or running statistics that are not finite ({len(ruined)}):", *_indented(ruined)]
    for episode, videos in zip(episodes, videos_of, strict=True):
        output, _ = step.add_gradient(episode, len(episodes))
        terms = ", ".join(f"{name} {value.item():g}" for name, value in output.losses.items())
        lines.append(f"episode {episode.index}: loss {output.total.item():g} ({terms})")
        if not output.total.isfinite():
            lines += _indented(videos)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    broken = not_finite(gradients)
    lines.append(f"the gradients of {len(broken)} of {len(gradients)} parameters are not finite")
    return lines + _indented(broken)


def saved_step(content: dict[str, Any], path: Path) -> tuple[range, list[list[str]]]:
    """Returns the episodes of the saved step, and the videos of each.

    Raises:
        UserError: the file contains no step.
    """
    match content.get("replay"):
        case {"episodes": [int(first), *rest], "videos": [*videos]}:
            group = range(first, first + 1 + len(rest))
            is_whole = first >= 0 and rest == list(group)[1:] and len(videos) == len(group)
            if is_whole and all(isinstance(one, list) for one in videos):
                return group, videos
    raise UserError(f"{path}: contains no step to replay; use a replay_<episode>.pt of a training run")


def _indented(names: Sequence[str]) -> list[str]:
    return [f"  {name}" for name in first_of(names, MAX_SHOWN)]
