"""TEST.FEATURE_CACHE: damaged files, full disks, interruptions and files of the user."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from run import evaluation, feature_cache, features
from run.features import FeatureBank
from run.main_run import Learner
from tests.helpers.features import SAME, Tests, trained_checkpoint
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import tiny_config, trained
from utils.errors import StopRequested, UserError

MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(scope="module")
def checkpoint(tiny_dataset: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_checkpoint(tiny_dataset, tmp_path_factory.mktemp("checkpoint") / "run")


@pytest.fixture
def test(own, checkpoint, tmp_path, monkeypatch) -> Tests:
    return Tests(own, checkpoint, tmp_path / "features", monkeypatch)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def write_notes(path: Path) -> None:
    path.write_bytes(b"my notes \xff")


def remove_description(path: Path) -> None:
    path.with_suffix(".json").unlink()


def overwrite_description(path: Path) -> None:
    write_notes(path.with_suffix(".json"))


def change_description(path: Path) -> None:
    description = path.with_suffix(".json")
    description.write_text(description.read_text().replace('"SEQ_LEN": 4', '"SEQ_LEN": 8'))


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte, cut_off, empty, write_notes, remove_description, overwrite_description,
        change_description,
    ],
)  # fmt: skip
def test_a_damaged_file_is_recomputed_with_a_warning(test, damage: Callable[[Path], None], capsys):
    first = test()
    (path,) = test.files()
    damage(path)
    second = test()
    assert f"{path} is damaged" in capsys.readouterr().err
    assert test.encoded == 30
    assert all(second[key] == first[key] for key in SAME)
    test()
    assert test.encoded == 0
    assert test.files() == [path]


def test_renamed_features_are_recomputed(test):
    first = test()
    (path,) = test.files()
    test("DATA.SEQ_LEN=3")
    (other,) = set(test.files()) - {path}
    for suffix in (".npy", ".json"):
        shutil.copy(other.with_suffix(suffix), path.with_suffix(suffix))
    second = test()
    assert test.encoded == 30
    assert all(second[key] == first[key] for key in SAME)


def test_writing_to_features_does_not_change_the_file(tmp_path):
    file = feature_cache.FeatureFile(tmp_path, "test", {"clips": 1})
    file.allocate([2, 3]).fill_(7)
    file.keep()
    file.read().zero_()
    assert file.read().tolist() == [[7.0] * 3] * 2


@pytest.mark.skipif(not MAPPINGS.exists(), reason="lists the files that are memory-mapped on Linux only")
def test_new_and_stored_features_are_memory_mapped(test, monkeypatch):
    mapped, precompute = [], evaluation.precompute_supports

    def noted(*arguments: Any) -> FeatureBank:
        mapped.append(str(test.folder) in MAPPINGS.read_text())
        return precompute(*arguments)

    monkeypatch.setattr(evaluation, "precompute_supports", noted)
    test()
    test()
    test("TEST.FEATURE_CACHE=")
    assert mapped == [True, True, False]


def test_other_files_in_the_folder_are_unchanged(test):
    test.folder.mkdir()
    (test.folder / "notes.txt").write_text("mine")
    test()
    assert (test.folder / "notes.txt").read_text() == "mine"
    assert len(test.files()) == 2


def no_space(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["posix_fallocate", "replace"])
def test_a_full_disk_does_not_stop_the_test_run(test, monkeypatch, capsys, call):
    expected = test("TEST.FEATURE_CACHE=")
    monkeypatch.setattr(feature_cache.os, call, no_space)
    monkeypatch.setattr("run.results.write_results", lambda *_: None)  # it calls `os.replace` too
    found = test()
    assert "No space left on device" in capsys.readouterr().err
    assert all(found[key] == expected[key] for key in SAME)
    assert test.files() == []


def test_an_interrupted_run_leaves_no_file(test, monkeypatch):
    monkeypatch.setattr(features.stopping, "check", mock.Mock(side_effect=[None, StopRequested("stopped", 130)]))
    monkeypatch.setattr(features, "FRAMES_PER_BATCH", 8)
    with pytest.raises(StopRequested):
        test()
    assert test.files() == []


def test_an_impossible_folder_is_refused_before_reading_videos(test):
    test.folder.write_text("a file")
    with pytest.raises(UserError, match=r"TEST\.FEATURE_CACHE: cannot create the folder"):
        test()
    assert test.encoded == 0


def test_an_impossible_folder_is_refused_before_training(tiny_dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"TEST\.FEATURE_CACHE: cannot create the folder"):
        Learner(tiny_config(tiny_dataset, tmp_path / "run", f"TEST.FEATURE_CACHE={tmp_path / 'file'}"))
    assert not (tmp_path / "run").exists()


def test_the_description_lists_what_the_features_depend_on(test):
    test()
    (path,) = test.files()
    assert np.load(path).shape == (30, 4, 128)
    description = json.loads(path.with_suffix(".json").read_text())
    assert description["clips"]["SEQ_LEN"] == 4
    assert description["backbone"]["BACKBONE"] == "tiny"


def test_validation_stores_no_features(test, tmp_path):
    trained(test.data, tmp_path / "run", f"TEST.FEATURE_CACHE={test.folder}")
    assert test.files() == []
