"""TEST.FEATURE_CACHE: stored features save work and never change a result."""

import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml

import models
from episodes.demo.render import write_video
from episodes.splits import ClassEntry, SplitIndex
from models.base import FewShotModel
from run import feature_cache
from run.encoder import BackboneEncoder
from run.feature_cache import files_digest, source_file
from tests.helpers.features import SAME, Tests, trained_checkpoint
from tests.helpers.tiny_dataset import TinyDataset, tiny_video_frames
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.files import exclusive
from utils.schema import ModelOptions


@pytest.fixture(scope="module")
def checkpoint(tiny_dataset: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_checkpoint(tiny_dataset, tmp_path_factory.mktemp("checkpoint") / "run")


@pytest.fixture
def test(own, checkpoint, tmp_path, monkeypatch) -> Tests:
    return Tests(own, checkpoint, tmp_path / "features", monkeypatch)


def test_a_second_test_run_encodes_nothing_and_is_bit_exact(test):
    without = test("TEST.FEATURE_CACHE=")
    plain = list(test.scores)
    assert test.encoded == 30
    assert not test.folder.exists()
    first = test()
    assert test.encoded == 30
    kept = list(test.scores)
    second = test()
    assert test.encoded == 0
    for scores in (kept, test.scores):
        assert all(torch.equal(found, expected) for found, expected in zip(scores, plain, strict=True))
    assert all(second[key] == first[key] == without[key] for key in SAME)
    assert len(test.files()) == 1


def test_concurrent_runs_encode_once(test, monkeypatch, capsys):
    test()
    [file] = test.files()
    aside, ready, waited = (file.with_name(f"{name}.json") for name in ("aside", "ready", "waited"))
    file.rename(aside)
    writer = os.fork()
    if not writer:  # another run that is about to end
        with exclusive(file.with_suffix(".lock"), "", ""):
            ready.touch()
            while not waited.exists():
                time.sleep(0.01)
            aside.rename(file)
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    monkeypatch.setattr(feature_cache, "time", SimpleNamespace(sleep=lambda seconds: (waited.touch(), time.sleep(0.1))))
    test()
    os.waitpid(writer, 0)
    assert test.encoded == 0
    assert capsys.readouterr().err.count(f"process {writer} ") == 1


def test_other_episodes_use_the_same_file(test):
    test("TEST.TEST_EPISODES=2")
    assert test.encoded == 30  # all videos of the split, so that the next test finds its own
    sampling = "DATA.SAMPLING=segments"  # only of training clips
    for override in ("TEST.SHOT=2", "TEST.WAY=4", "MODEL.SEED=9", "TEST.PROTOCOL=transductive", sampling):
        test(override)
        assert test.encoded == 0
    assert len(test.files()) == 1


@pytest.mark.parametrize(
    "override",
    ["DATA.SEQ_LEN=3", "DATA.IMG_NORM=false", "DATA.SHORT_SIDE=40", "USE_AMP=true"],
)
def test_other_clips_and_precisions_are_recomputed(test, override):
    test()
    test(override)
    assert test.encoded == 30
    assert len(test.files()) == 2
    test()
    assert test.encoded == 0


def test_other_weights_are_recomputed(test, tmp_path):
    before = test()
    content = load_checkpoint(test.checkpoint)
    name = next(name for name in content["model"] if "convolutions" in name)
    content["model"][name].view(-1)[0] += 1e-3
    test.checkpoint = tmp_path / "changed.pt"
    save_checkpoint(test.checkpoint, content)
    assert test()["checkpoint_sha256"] != before["checkpoint_sha256"]
    assert test.encoded == 30


# One backbone, several methods


def tiny_options(name: str, **changes: Any) -> ModelOptions:
    return models.options_of(name)(NAME=name, BACKBONE="tiny", CLIP_WEIGHTS="random", SEED=1, **changes)


def test_methods_with_the_same_backbone_share_a_file(test):
    test.as_loaded(tiny_options("otam"))
    assert test.encoded == 30
    for options in (tiny_options("zeroshot"), tiny_options("clipspm", PADM={"ENABLED": False})):
        test.as_loaded(options)
        assert test.encoded == 0, options
    mean = tiny_options("otam", MATCHER="mean")
    shared = test.as_loaded(mean)
    assert test.encoded == 0
    assert len(test.files()) == 1
    expected = test.as_loaded(mean, "TEST.FEATURE_CACHE=")
    assert all(shared[key] == expected[key] for key in SAME)


def test_a_head_after_the_backbone_uses_stored_features(test):
    test.as_loaded(tiny_options("a2m2", REDUCED_WIDTH=8))
    assert test.encoded == 30
    options = tiny_options("a2m2", REDUCED_WIDTH=4, ADAPTIVE=False)
    test.as_loaded(options)
    assert test.encoded == 0
    assert len(test.files()) == 1
    kept = list(test.scores)
    test.as_loaded(options, "TEST.FEATURE_CACHE=")
    for found, plain in zip(kept, test.scores, strict=True):
        torch.testing.assert_close(found, plain)


def test_another_activation_of_the_same_weights_is_recomputed(test, monkeypatch):
    """The activation is an option of the backbone that is not visible in any weight."""
    test.as_loaded(tiny_options("otam"))
    otam = models.method_class("otam")
    features = otam.backbone_features
    monkeypatch.setattr(otam, "backbone_features", lambda self, frames: features(self, frames).relu())
    test.as_loaded(tiny_options("otam"))
    assert test.encoded == 30
    assert len(test.files()) == 2


def test_a_backbone_weight_unused_by_the_trial_is_part_of_the_key(test):
    learner = test.learner("run")
    model = learner.model.eval()
    encoder = BackboneEncoder(model, learner.device, normalise_pixels=True, amp=False)

    def digest() -> str:
        return feature_cache.describe_encoding(learner.config, encoder)["weights"]

    first = digest()
    for name, value in model.state_dict().items():
        if not name.startswith("clip."):
            value.add_(1)
    assert digest() == first
    weight = model.state_dict()["clip.visual.convolutions.0.weight"].view(-1)[:1]
    weight.copy_(weight.nextafter(weight + 1))  # by one bit
    assert digest() != first


def test_weights_of_layers_within_encode_are_part_of_the_key(test, monkeypatch):
    """The method does not split its `encode`: the key depends on a layer that does not affect the trial clip."""
    uncut = models.method_class("a2m2")
    monkeypatch.setattr(uncut, "backbone_features", FewShotModel.backbone_features)
    monkeypatch.setattr(
        uncut, "encode", lambda self, frames: self.M2(self.encoder.feature_maps(frames)).new_zeros(1, 2)
    )
    learner = test.learner("run", model=tiny_options("a2m2", REDUCED_WIDTH=8))
    encoder = BackboneEncoder(learner.model.eval(), learner.device, normalise_pixels=True, amp=False)
    first = feature_cache.describe_encoding(learner.config, encoder)
    learner.model.M2.reduce[0].weight.data += 1
    second = feature_cache.describe_encoding(learner.config, encoder)
    assert first["trial"] == second["trial"]
    assert first["weights"] != second["weights"]


def test_training_from_cached_features_reads_and_writes_the_folder(test):
    cached = ("MODEL.TRAINABLE=head", "TRAIN.CACHED_FEATURES=true")
    test.learner("whole", *cached).train()
    assert test.encoded == 36 + 30  # the training classes' videos and the validation's, once for the whole run
    assert len(test.files()) == 2
    again = test.learner("again", *cached, "MODEL.SPM.ENABLED=false")
    again.train()
    assert test.encoded == 0
    plain = test.learner("plain", *cached, "MODEL.SPM.ENABLED=false", "TEST.FEATURE_CACHE=")
    plain.train()
    for key, value in plain.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[key], value, rtol=1e-4, atol=1e-6)


# The videos


def test_a_replaced_video_is_detected(test):
    test()
    video = next(test.data.videos.glob("test_action_0/*.mp4"))
    write_video(video, tiny_video_frames("another"))
    found = test()
    assert test.encoded == 30
    assert found["per_episode"] == test("TEST.FEATURE_CACHE=")["per_episode"]


def test_a_replaced_frame_in_a_folder_is_detected(test, tiny_dataset):
    shutil.copytree(tiny_dataset.frames, test.data.frames)
    frames = f"DATA.DATA_DIR={test.data.frames}"
    test(frames)
    folder = next(test.data.frames.glob("test_action_0/*"))
    before = folder.stat().st_mtime_ns
    with open(folder / "00003.jpg", "r+b") as file:  # in place: the folder's modification time does not change
        file.write(file.read(1))
    os.utime(folder / "00003.jpg", ns=(1, 1))
    assert folder.stat().st_mtime_ns == before
    test(frames)
    assert test.encoded == 30


def test_a_replaced_store_is_detected(tmp_path):
    paths = ("test.sqlite/a/1", "test.sqlite/a/2")
    index = SplitIndex(
        "x", "test", tmp_path, (ClassEntry("a", "a", 2),), ("a/1", "a/2"), paths, np.zeros(2, int), False
    )
    digests = []
    for content, seconds in ((b"1", 1), (b"22", 1), (b"33", 2)):  # another length, then only another time
        (tmp_path / "test.sqlite").write_bytes(content)
        os.utime(tmp_path / "test.sqlite", ns=(seconds, seconds))
        digests += [feature_cache.data_digest(index), feature_cache.data_digest(index)]
    assert digests[::2] == digests[1::2]
    assert len(set(digests)) == 3


def test_code_of_an_external_method_is_part_of_the_key(tmp_path):
    source, digests = tmp_path / "outside.py", []
    for name in ("First", "Second", "Second"):
        source.write_text(f"class {name}: pass\n")
        spec = importlib.util.spec_from_file_location(source.stem, source)
        module = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, {source.stem: module}):
            spec.loader.exec_module(module)
            digests.append(files_digest((), source_file(getattr(module, name)())))
    assert digests[0] != digests[1] == digests[2]


def test_the_file_depends_on_the_data_folder_but_not_on_prompts(test, tmp_path):
    test()
    content = yaml.safe_load((test.data.splits / "classes.yaml").read_text())
    content["test"][0]["prompt"] = "something else"
    (test.data.splits / "classes.yaml").write_text(yaml.safe_dump(content))
    test()
    assert test.encoded == 0
    shutil.copytree(test.data.videos, tmp_path / "elsewhere")
    test(f"DATA.DATA_DIR={tmp_path / 'elsewhere'}")
    assert test.encoded == 30
    assert len(test.files()) == 2


def test_other_code_and_packages_are_recomputed(test, monkeypatch):
    test()
    monkeypatch.setattr(feature_cache, "package_versions", lambda: {"torch": "0.1"})
    test()
    assert test.encoded == 30
    monkeypatch.setattr(feature_cache, "files_digest", lambda *files: "other code")
    test()
    assert test.encoded == 30
