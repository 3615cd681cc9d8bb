"""A loss or gradient that is not finite stops the run: before the step on a CPU, before any file on a GPU.

A GPU is not needed to test the latter: the only difference is that the flag is not read at every step.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from models.base import EpisodeOutput
from run.main_run import Learner
from run.solver import Solver
from run.training_step import FiniteWatch, NotFiniteError, TrainingStep
from tests.helpers.tiny_runs import tiny_config
from utils.checkpoint import load_checkpoint
from utils.config_changes import MAY_CHANGE_ON_RESUME
from utils.errors import UserError
from utils.schema import SolverOptions

CPU = torch.device("cpu")
SEVERAL_STEPS = ("TRAIN.TRAIN_EPISODES=8", "TRAIN.VAL_FREQ=0", "TRAIN.PRINT_FREQ=8", "CHECKPOINT.SAVE_FREQ=2")


def lazy_watch() -> FiniteWatch:
    """Returns a watch as for a GPU."""
    watch = FiniteWatch(CPU)
    watch.checks_every_step = False
    return watch


@pytest.mark.parametrize(("loss", "norm"), [("nan", 1.0), ("inf", 1.0), (1.0, "nan"), (1.0, "inf")])
def test_a_cpu_raises_at_the_first_nonfinite_step_with_its_episodes(loss, norm):
    watch = FiniteWatch(CPU)
    watch.record(range(4), torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(NotFiniteError, match=r"of training episodes 4 to 7 is not finite") as refused:
        watch.record(range(4, 8), torch.tensor(float(loss)), torch.tensor(float(norm)))
    assert refused.value.group == range(4, 8)
    for key in ("SOLVER.LR", "TRAIN.CLIP_GRAD"):  # the suggested settings cannot be changed when resuming
        assert not key.startswith(MAY_CHANGE_ON_RESUME)
        assert key in str(refused.value)
    assert "start a new run" in str(refused.value)


def test_the_first_group_is_reported_later():
    watch = lazy_watch()
    for start, loss in ((0, 1.0), (2, float("inf")), (4, 1.0), (6, float("nan"))):
        watch.record(range(start, start + 2), torch.tensor(loss), torch.tensor(1.0))
    with pytest.raises(NotFiniteError, match="the loss \\(inf\\)") as refused:
        watch.raise_if_nonfinite()
    assert refused.value.group == range(2, 4)


@pytest.mark.parametrize("method", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_weights_and_optimizer_are_unchanged_after_the_first_bad_step(method, clip):
    model = nn.Linear(3, 1)
    solver = Solver(model, SolverOptions(OPTIM_METHOD=method, LR=0.1), total_episodes=4, clip_grad=clip)
    watch = lazy_watch()
    for i, scale in enumerate([1.0, float("nan"), 1.0]):
        loss = scale * model(torch.ones(1, 3)).square().sum()
        loss.backward()
        before = [value.clone() for value in model.parameters()]
        moments = [value.clone() for state in solver.optimizer.state.values() for value in state.values()]
        norm = solver.gradient_norm()
        watch.record(range(i, i + 1), loss.detach(), norm)
        solver.step(i + 1, norm, skip=watch.flag)
        same = [torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
        assert all(same) == (i > 0)
        if i > 0:
            after = [value for state in solver.optimizer.state.values() for value in state.values()]
            assert all(torch.equal(old, new) for old, new in zip(moments, after, strict=True))


@pytest.mark.parametrize("lazy", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nonfinite_step_stops_the_run_without_further_writes(what, lazy, tiny_dataset, tmp_path, monkeypatch):
    """Episode 5, of the third step, is bad; the checkpoint after the second step is the last."""
    plain = TrainingStep.forward

    def forward(step: TrainingStep, episode):
        output, labels = plain(step, episode)
        if episode.index != 5:
            return output, labels
        if what == "loss":
            return EpisodeOutput(output.scores, {"cross_entropy": output.total * float("nan")}), labels
        parameter = step.solver.parameters[0]
        return EpisodeOutput(output.scores, {"cross_entropy": output.total + (0 * parameter).sqrt().sum()}), labels

    monkeypatch.setattr(TrainingStep, "forward", forward)
    learner = Learner(tiny_config(tiny_dataset, tmp_path / "run", *SEVERAL_STEPS))
    if lazy:
        record = FiniteWatch.record
        monkeypatch.setattr(
            FiniteWatch,
            "record",
            lambda watch, *seen: (setattr(watch, "checks_every_step", False), record(watch, *seen)),
        )
    with pytest.raises(UserError, match=r"training episodes 4 to 5 is not finite.*replay_4\.pt"):
        learner.train()
    assert load_checkpoint(tmp_path / "run" / "replay_4.pt")["episode"] == 4
    content = load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")
    assert content["episode"] == 4
    before_step = load_checkpoint(tmp_path / "run" / "replay_4.pt")["model"]
    for name, value in learner.model.named_parameters():
        assert torch.equal(value, content["model"][name]), name
        assert torch.equal(value, before_step[name]), name
    assert not (tmp_path / "run" / "checkpoint_best.pt").exists()
    assert lines(tmp_path / "run") == []


def lines(directory: Path) -> list[dict]:
    file = directory / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
