"""A nonfinite step is skipped, can be replayed, and does not change the run; deterministic runs are bit-exact."""

import json
from pathlib import Path

import pytest
import torch

from models.base import EpisodeOutput
from run.main_run import Learner
from run.replay import replay
from run.training_step import TrainingStep
from tests.helpers.same_runs import assert_same_model
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import tiny_config, trained
from utils.checkpoint import LAST, file_digest, load_checkpoint, save_checkpoint
from utils.errors import UserError

STEPS = ("TRAIN.TRAIN_EPISODES=6", "TRAIN.VAL_FREQ=2", "TRAIN.VAL_EPISODES=2", "MODEL.SPM.ENABLED=false")


class InfiniteGradient(torch.autograd.Function):
    """The identity, with a gradient that is infinite."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("inf")


def make_nonfinite(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Makes the loss or the gradient of training episode 3 nonfinite."""
    forward = TrainingStep.forward

    def nonfinite_forward(step: TrainingStep, episode):
        output, labels = forward(step, episode)
        losses = dict(output.losses)
        if episode.index == 3:
            name = next(iter(losses))
            losses[name] = losses[name] * float("nan") if where == "loss" else InfiniteGradient.apply(losses[name])
        return EpisodeOutput(output.scores, losses), labels

    monkeypatch.setattr(TrainingStep, "forward", nonfinite_forward)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nonfinite_step_changes_nothing_and_can_be_replayed(tiny_dataset, tmp_path, monkeypatch, where):
    make_nonfinite(monkeypatch, where)
    learner = Learner(tiny_config(tiny_dataset, tmp_path / "run", *STEPS))
    with pytest.raises(UserError, match=r"of training episodes 2 to 3 is not finite.*--replay .*replay_2\.pt"):
        learner.train()
    last = load_checkpoint(tmp_path / "run" / LAST)
    assert last["episode"] == 2
    parameters = dict(learner.model.named_parameters())
    assert all(torch.equal(value, last["model"][name]) for name, value in parameters.items())
    files = {path: file_digest(path) for path in (tmp_path / "run").rglob("*") if path.is_file()}

    path = tmp_path / "run" / "replay_2.pt"
    content = load_checkpoint(path)
    assert all(torch.equal(value, content["model"][name]) for name, value in parameters.items())
    assert (content["replay"]["seed"], content["replay"]["episodes"]) == (1, [2, 3])
    assert all(Path(video).is_file() for videos in content["replay"]["videos"] for video in videos)

    lines = replay(path, [])
    (of_episode,) = [line for line in lines if line.startswith("episode 3: loss")]
    assert ("nan" in of_episode) == (where == "loss")
    (count,) = [line for line in lines if line.startswith("the gradients of")]
    assert not count.startswith("the gradients of 0")
    assert any(line.strip() in parameters for line in lines)
    assert files == {path: file_digest(path) for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "cached", [(), ("MODEL.TRAINABLE=head", "TRAIN.CACHED_FEATURES=true")], ids=["clips", "cached"]
)
def test_a_replay_reproduces_training_losses(tiny_dataset, tmp_path, monkeypatch, cached):
    make_nonfinite(monkeypatch, "gradient")
    nonfinite_forward, losses = TrainingStep.forward, []

    def noted(step, episode):
        output, labels = nonfinite_forward(step, episode)
        losses.append(f"episode {episode.index}: loss {output.total.item():g}")
        return output, labels

    monkeypatch.setattr(TrainingStep, "forward", noted)
    with pytest.raises(UserError, match="not finite"):
        trained(tiny_dataset, tmp_path / "run", *STEPS, *cached)
    lines = replay(tmp_path / "run" / "replay_2.pt", [])
    assert [line.partition(" (")[0] for line in lines if line.startswith("episode ")] == losses[2:4] == losses[4:]


def test_a_replay_of_a_finite_step_finds_nothing(tiny_dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patches:
        make_nonfinite(patches, "loss")
        with pytest.raises(UserError, match="not finite"):
            trained(tiny_dataset, tmp_path / "run", *STEPS)
    lines = replay(tmp_path / "run" / "replay_2.pt", [])
    assert not any("nan" in line for line in lines)
    assert any(line.startswith("the gradients of 0 of") for line in lines)


def test_a_checkpoint_without_a_step_is_not_replayed(tiny_dataset, tmp_path):
    trained(tiny_dataset, tmp_path / "run", *STEPS, "TRAIN.TRAIN_EPISODES=2")
    with pytest.raises(UserError, match=r"no step to replay; use a replay_<episode>\.pt"):
        replay(tmp_path / "run" / LAST, [])
    content = load_checkpoint(tmp_path / "run" / LAST)
    for episodes, videos in [(3, [[]]), ([], []), (["a"], [[]]), ([-5], [[]]), ([1, 3], [[], []]), ([1, 2], [[]])]:
        save_checkpoint(tmp_path / "odd.pt", {**content, "replay": {"episodes": episodes, "videos": videos}})
        with pytest.raises(UserError, match=r"odd\.pt"):
            replay(tmp_path / "odd.pt", [])
    with pytest.raises(UserError, match="no such checkpoint"):
        replay(tmp_path / "nowhere.pt", [])


def test_a_step_with_nonfinite_running_statistics_can_be_replayed(tiny_dataset, tmp_path, monkeypatch):
    forward = TrainingStep.forward

    def insert_nan(step: TrainingStep, episode):
        if episode.index == 3:
            dict(step.model.named_buffers())["clip.visual.convolutions.1.running_var"].fill_(float("inf"))
        output, labels = forward(step, episode)
        factor = float("nan") if episode.index == 3 else 1.0
        return EpisodeOutput(output.scores, {name: factor * loss for name, loss in output.losses.items()}), labels

    with monkeypatch.context() as patches:
        patches.setattr(TrainingStep, "forward", insert_nan)
        with pytest.raises(UserError, match="not finite"):
            trained(tiny_dataset, tmp_path / "run", *STEPS, "MODEL.FREEZE_BN=false")
    lines = replay(tmp_path / "run" / "replay_2.pt", [])
    found = lines.index("weights or running statistics that are not finite (1):")
    assert lines[found + 1] == "  clip.visual.convolutions.1.running_var"
    assert any(line.startswith("episode 3: loss") for line in lines)


def test_replaying_with_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.distributed.world_size", lambda: 2)
    with pytest.raises(UserError, match="without torchrun"):
        replay(tmp_path / "replay.pt", [])


def assert_bit_identical(data: TinyDataset, folder: Path, device: str) -> None:
    """Asserts that two deterministic runs have equal weights, optimizer states and answers."""
    settings = (*STEPS, "DEVICE.DETERMINISTIC=true", f"DEVICE.DEVICE={device}")
    try:
        results = [trained(data, folder / name, *settings).test() for name in ("a", "b")]
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_model(*(load_checkpoint(folder / name / LAST) for name in ("a", "b")))
    assert json.dumps(results[0]["per_episode"]) == json.dumps(results[1]["per_episode"])


def test_deterministic_mode_is_bit_exact_on_a_cpu(tiny_dataset, tmp_path):
    assert_bit_identical(tiny_dataset, tmp_path, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_deterministic_mode_is_bit_exact_on_a_gpu(tiny_dataset, tmp_path):
    assert_bit_identical(tiny_dataset, tmp_path, "cuda")


def test_deterministic_mode_ends_with_the_run(tiny_dataset, tmp_path):
    try:
        Learner(tiny_config(tiny_dataset, tmp_path / "run", "DEVICE.DETERMINISTIC=true"))
        assert torch.are_deterministic_algorithms_enabled()
        Learner(tiny_config(tiny_dataset, tmp_path / "run"))
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
