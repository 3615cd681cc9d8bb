"""Layers used only in training: a classifier of the training classes, and a decoder that needs frames."""

import shutil
from pathlib import Path

import pytest
import torch

import models
from episodes.dataset import BadClips, EpisodeDataset
from run.main_run import Learner
from run.meter import Meter
from run.run_directory import TrainingState
from run.solver import Solver
from tests.helpers.shipped import ROOT
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import lines_of, tiny_config
from utils.checkpoint import load_checkpoint
from utils.config import load_config
from utils.errors import UserError

RECONSTRUCTION = "MODEL.RECONSTRUCTION_WEIGHT=0.2"
CACHED = ("MODEL.TRAINABLE=head", "TRAIN.CACHED_FEATURES=true")
SECTIONS = ("DATA", "TRAIN", "TEST", "DEVICE", "CHECKPOINT")


def molo(data: TinyDataset, directory: Path, *overrides: str) -> Learner:
    """Returns the config of MoLo on the tiny data set, with dropout, classifier and decoder."""
    tiny = tiny_config(data, directory)
    config = load_config(ROOT / "configs" / "molo" / "demo.yaml", [RECONSTRUCTION, "MODEL.FREEZE_BN=true", *overrides])
    small = {section: getattr(tiny, section) for section in SECTIONS}
    train = {name: getattr(config.config.TRAIN, name) for name in ("CHUNK", "CACHED_FEATURES")}
    test = {name: getattr(config.config.TEST, name) for name in ("ONLY_TEST", "TEST_MODEL_PATH")}
    resume = {"RESUME_FROM_CHECKPOINT": config.config.CHECKPOINT.RESUME_FROM_CHECKPOINT}
    for section, values in (("TRAIN", train), ("TEST", test), ("CHECKPOINT", resume)):
        small[section] = small[section].model_copy(update=values)
    return Learner(config.config.model_copy(update=small))


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory) -> tuple[Learner, Path]:
    directory = tmp_path_factory.mktemp("runs") / "whole"
    learner = molo(tiny_dataset, directory)
    learner.train()
    return learner, directory


def test_the_classifier_has_all_training_classes_and_losses_are_logged(run):
    learner, directory = run
    assert len(learner.model.classify.weight) == len(learner.data.splits["train"].classes)
    logged = [line for line in lines_of(directory) if "train/loss" in line]
    assert all(line[f"train/loss_{name}"] > 0 for line in logged for name in ("class", "contrast", "reconstruction"))


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_run(run, tiny_dataset, tmp_path):
    learner, directory = run
    copied = tmp_path / "copied"
    copied.mkdir()
    shutil.copy(directory / "checkpoint_4.pt", copied / "checkpoint_last.pt")
    resumed = molo(tiny_dataset, copied, "CHECKPOINT.RESUME_FROM_CHECKPOINT=true")
    resumed.train()
    for name, value in learner.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_checkpoint_loads_without_its_classifier(run, tiny_dataset, tmp_path):
    learner, directory = run
    best = directory / "checkpoint_best.pt"
    assert "classify.weight" in load_checkpoint(best)["model"]
    tested = molo(tiny_dataset, tmp_path, "TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={best}")
    assert tested.test()["accuracy"] == learner.test()["accuracy"]
    without = models.load(best, overrides=["MODEL.RECONSTRUCTION_WEIGHT=0"])
    assert tested.model.classify is None
    assert without.decoder is None
    frames = torch.rand(1, 4, 3, 32, 32)
    assert torch.equal(without.encode(frames), learner.model.eval().encode(frames))


def test_other_unknown_entries_are_still_refused(run):
    _, directory = run
    with pytest.raises(UserError, match="unknown"):
        models.load(directory / "checkpoint_best.pt", overrides=["MODEL.NAME=hyrsm"])


def test_chunking_keeps_losses_and_gradients(tiny_dataset, tmp_path):
    found = []
    for chunk in (0, 2):
        learner = molo(tiny_dataset, tmp_path / str(chunk), f"TRAIN.CHUNK={chunk}")
        model = learner.model.train()
        solver = Solver(model, learner.config.SOLVER, 10)
        step = learner.training_step(TrainingState(model, solver, Meter(learner.device), BadClips(0)))
        episode = EpisodeDataset(learner.data.samplers["train"], learner.data.clip_options, range(1))[0]
        output, _ = step.add_gradient(episode, 1)
        assert "reconstruction" in output.losses
        found.append((output.losses, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_cached_features_are_refused_when_a_loss_needs_frames(tiny_dataset, tmp_path):
    with pytest.raises(UserError, match=r"TRAIN\.CACHED_FEATURES.*frames") as refused:
        molo(tiny_dataset, tmp_path / "with", *CACHED).train()
    assert "\n" not in str(refused.value)
    molo(tiny_dataset, tmp_path / "without", *CACHED, "MODEL.RECONSTRUCTION_WEIGHT=0").train()
