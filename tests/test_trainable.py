"""MODEL.TRAINABLE: trained and frozen parameters, and features in place of a frozen backbone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models
from episodes.dataset import EpisodeDataset, VideoDataset
from models.base import FewShotModel
from run.main_run import Learner
from tests.helpers.distributed_jobs import train_until
from tests.helpers.outside_method import OUTSIDE, OutsideOptions
from tests.helpers.small_towers import KINDS, frames, tower
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import lines_of, tiny_config, trained
from utils.checkpoint import LAST, load_checkpoint
from utils.config import load_config
from utils.errors import UserError

HEAD = "MODEL.TRAINABLE=head"
CACHED = (HEAD, "TRAIN.CACHED_FEATURES=true", "CHECKPOINT.SAVE_FREQ=2")
OTAM = "configs/otam/demo.yaml"

# Kind -> for each N the first names below `visual` that are trained, and those that still are not.
LAST_N = {
    "ViT": {
        1: (("transformer.resblocks.3", "ln_post", "proj"), ("transformer.resblocks.2", "conv1", "class_embedding")),
        4: (("transformer.resblocks.0", "ln_post", "proj"), ("conv1", "class_embedding", "positional_", "ln_pre")),
    },
    "RN": {
        1: (("layer4", "attnpool"), ("layer3", "conv1", "bn3")),
        4: (("layer1", "layer4", "attnpool"), ("conv1", "bn1", "conv3")),
    },
    "resnet": {1: (("layer4", "fc"), ("layer3", "conv1")), 4: (("layer1", "layer4"), ("conv1", "bn1"))},
    "tiny": {
        1: (("convolutions.9", "convolutions.10", "project"), ("convolutions.0", "convolutions.6", "convolutions.7")),
        4: (("convolutions.0", "project"), ()),
    },
}


# What is trained


@pytest.mark.parametrize(("kind", "last"), [(kind, last) for kind in KINDS for last in LAST_N[kind]])
def test_last_n_trains_the_last_blocks_and_later_layers(kind, last):
    model = tower(kind, TRAINABLE=f"last_{last}")
    model(frames()).square().sum().backward()
    trains = {name: parameter.grad is not None for name, parameter in model.visual.named_parameters()}
    yes, no = LAST_N[kind][last]
    for name, is_trained in trains.items():
        if name.startswith(yes):
            assert is_trained, name
        if name.startswith(no):
            assert not is_trained, name
    assert all(trains.values()) == (not no)


@pytest.mark.parametrize("kind", KINDS)
def test_all_trains_the_backbone_and_head_freezes_it(kind):
    assert all(parameter.requires_grad for parameter in tower(kind).parameters())
    assert not any(parameter.requires_grad for parameter in tower(kind, TRAINABLE="head").parameters())


@pytest.mark.parametrize("kind", ["RN", "resnet", "tiny"])
def test_only_trained_batch_norms_update_statistics(kind):
    model = tower(kind, TRAINABLE="last_1", FREEZE_BN=False)
    norms = {name: module for name, module in model.visual.named_modules() if isinstance(module, nn.BatchNorm2d)}
    before = {name: norm.running_mean.clone() for name, norm in norms.items()}
    model(frames())
    moved = {name for name, norm in norms.items() if not torch.equal(norm.running_mean, before[name])}
    assert moved == {name for name in norms if name.startswith(("layer4", "convolutions.10"))}


def test_too_many_blocks_are_refused_in_one_sentence():
    with pytest.raises(UserError, match=r"MODEL\.TRAINABLE is last_5, but tiny has 4 blocks: .*last_4 or less"):
        tower("tiny", TRAINABLE="last_5")
    with pytest.raises(UserError, match="the blocks of other are not known"):
        tower("other", TRAINABLE="last_1")
    assert not any(parameter.requires_grad for parameter in tower("other", TRAINABLE="head").parameters())


@pytest.mark.parametrize("value", ["last_0", "last_", "heads", "last_-1", "none"])
def test_an_unknown_value_is_refused_with_the_known_ones(value):
    with pytest.raises(UserError, match=r"MODEL\.TRAINABLE on the command line: expected all, head or last_N"):
        load_config(OTAM, [f"MODEL.TRAINABLE={value}"])


def test_a_method_with_a_custom_backbone_refuses_to_freeze_it():
    assert models.build(OutsideOptions(NAME=OUTSIDE), 32)
    with pytest.raises(UserError, match=r"MODEL\.TRAINABLE is head.*backbone of models/"):
        models.build(OutsideOptions(NAME=OUTSIDE, TRAINABLE="head"), 32)


def test_only_trainable_parameters_are_optimized_and_counted(tiny_dataset, tmp_path):
    learner = trained(tiny_dataset, tmp_path / "run", HEAD, "TRAIN.TRAIN_EPISODES=2")
    head = [p for name, p in learner.model.named_parameters() if not name.startswith("clip.")]
    stored = load_checkpoint(tmp_path / "run" / LAST)
    assert len(stored["optimizer"]["state"]) == len(head)
    output = f"{sum(p.numel() for p in head):,} of {sum(p.numel() for p in learner.model.parameters()):,} parameters"
    assert output in (tmp_path / "run" / "log.txt").read_text()
    fresh = Learner(tiny_config(tiny_dataset, tmp_path / "fresh", HEAD)).model.state_dict()
    for name, value in stored["model"].items():
        if name.startswith("clip."):
            assert torch.equal(value, fresh[name]), name


def test_a_method_without_a_head_cannot_train_it(tiny_dataset, tmp_path):
    options = models.options_of("otam")(NAME="otam", BACKBONE="tiny", CLIP_WEIGHTS="random", TRAINABLE="head")
    config = tiny_config(tiny_dataset, tmp_path / "run").model_copy(update={"MODEL": options})
    with pytest.raises(UserError, match=r"no parameter to train: .*MODEL\.TRAINABLE=all"):
        Learner(config).train()


# Cached features


def without_augmentation(dataset: EpisodeDataset, video: int, episode: int, position: int, clip: Tensor) -> None:
    clip.copy_(VideoDataset(dataset.sampler.index, dataset.options, [video])[0])


def a2m2_config(data: TinyDataset, directory: Path, *overrides: str) -> Any:
    small = tiny_config(data, directory, *overrides)
    options = models.options_of("a2m2")(
        NAME="a2m2", BACKBONE="tiny", CLIP_WEIGHTS="random", SEED=1, TRAINABLE="head", REDUCED_WIDTH=8
    )  # fmt: skip
    return small.model_copy(update={"MODEL": options})


@pytest.mark.parametrize("make_config", [tiny_config, a2m2_config], ids=["clipspm", "a2m2"])
def test_training_from_cached_features_equals_training_without_augmentation(
    make_config, tiny_dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(EpisodeDataset, "_draw_clip", without_augmentation)
    sgd = ("SOLVER.OPTIM_METHOD=sgd", "SOLVER.LR=0.01", HEAD)
    learners = {}
    for name, overrides in {"clips": sgd, "cached": (*sgd, *CACHED)}.items():
        learners[name] = Learner(make_config(tiny_dataset, tmp_path / name, *overrides))
        learners[name].train()
    weights = {name: learner.model.state_dict() for name, learner in learners.items()}
    for key, value in weights["clips"].items():
        torch.testing.assert_close(weights["cached"][key], value, rtol=1e-4, atol=1e-6)
    losses = {
        name: [line["train/loss"] for line in lines_of(tmp_path / name) if "train/loss" in line] for name in weights
    }
    assert losses["cached"] == pytest.approx(losses["clips"], rel=1e-5)
    start = Learner(make_config(tiny_dataset, tmp_path / "start", HEAD)).model.state_dict()
    assert any(not torch.equal(start[key], value) for key, value in weights["cached"].items())


def test_training_from_cached_features_resumes_bit_exact(tiny_dataset, tmp_path):
    whole = trained(tiny_dataset, tmp_path / "whole", *CACHED)
    train_until(Learner(tiny_config(tiny_dataset, tmp_path / "cut", *CACHED)), 2)
    cut = trained(tiny_dataset, tmp_path / "cut", *CACHED, "CHECKPOINT.RESUME_FROM_CHECKPOINT=true")
    for key, value in whole.model.state_dict().items():
        assert torch.equal(cut.model.state_dict()[key], value), key
    banks = [cut.training_episodes(range(first, 6)).bank for first in (0, 4)]  # batches of the same videos
    np.testing.assert_array_equal(banks[0].row_of_video, banks[1].row_of_video)


def test_cached_features_are_encoded_in_evaluation_mode(tiny_dataset, tmp_path, monkeypatch):
    learner, modes = Learner(tiny_config(tiny_dataset, tmp_path, *CACHED, "TRAIN.TRAIN_EPISODES=2")), []
    encode = learner.model.backbone_features
    monkeypatch.setattr(
        learner.model, "backbone_features", lambda frames: modes.append(learner.model.training) or encode(frames)
    )
    learner.train()
    assert modes
    assert not any(modes)


def test_testing_loaded_weights_needs_no_cached_features(tiny_dataset, tmp_path):
    trained(tiny_dataset, tmp_path / "run", *CACHED, "TRAIN.TRAIN_EPISODES=0")
    assert load_checkpoint(tmp_path / "run" / LAST)["episode"] == 0


def test_cached_features_need_a_frozen_backbone(tiny_dataset, tmp_path):
    with pytest.raises(UserError) as refused:
        tiny_config(tiny_dataset, tmp_path, "TRAIN.CACHED_FEATURES=true", "MODEL.TRAINABLE=last_1")
    assert "TRAIN.CACHED_FEATURES" in str(refused.value)
    assert "MODEL.TRAINABLE" in str(refused.value)


def test_cached_features_refuse_trained_layers_before_them(tiny_dataset, tmp_path, monkeypatch):
    config = a2m2_config(tiny_dataset, tmp_path / "run", *CACHED)
    uncut = models.method_class("a2m2")
    monkeypatch.setattr(uncut, "backbone_features", FewShotModel.backbone_features)
    monkeypatch.setattr(uncut, "encode", lambda self, frames: self.M2(self.encoder.feature_maps(frames)))
    monkeypatch.setattr(uncut, "encode_features", FewShotModel.encode_features)
    with pytest.raises(UserError, match=r"TRAIN\.CACHED_FEATURES.*`backbone_features`"):
        Learner(config).train()
