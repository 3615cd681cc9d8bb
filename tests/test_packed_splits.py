"""Packed stores as the data of a run: the videos that a split finds in them, and the messages before the run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from episodes.checks import unreadable_videos
from episodes.packed import write_packed
from episodes.splits import SplitIndex, load_splits
from episodes.video import probe
from tests.helpers.split_files import problems_of
from tests.helpers.tiny_dataset import TINY_FRAMES, TinyDataset, tiny_frame_files

VIDEO = "train_action_0/train_action_0_00"


def index_of(tiny_dataset: TinyDataset, root: Path, split: str = "train") -> SplitIndex:
    return load_splits(tiny_dataset.splits, root, [split])[split]


def repack(path: Path, frames: Path, split: str, change: Callable[[str], str | None]) -> None:
    """Writes the store of a split with other names; a name that becomes None is left out."""
    videos = [(change(name), files[:2]) for name, files in tiny_frame_files(frames, split)]
    write_packed(path, [(name, files) for name, files in videos if name is not None])


def test_a_listed_video_missing_from_the_store_is_reported(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    repack(tmp_path / "train.sqlite", tiny_dataset.frames, "train", lambda name: None if name == VIDEO else name)
    (problem,) = problems_of(tiny_dataset.listed_splits, tmp_path, ["train"])
    assert "trainlist03.txt line 1" in problem
    assert str(tmp_path / "train.sqlite") in problem
    index = index_of(tiny_dataset, tmp_path)
    assert index.notes == ("train_action_0 has 5 videos, the class list expects 6",)


def test_a_class_missing_from_all_stores_is_reported(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    repack(tmp_path / "train.sqlite", tiny_dataset.frames, "train", lambda name: name)
    first, others = problems_of(tiny_dataset.splits, tmp_path, ["test"])
    assert first.startswith("class 'test_action_0' of test is in no packed store")
    assert str(tmp_path / "train.sqlite") in first
    assert "4 classes" in others


def test_a_class_is_found_in_the_store_of_another_split(
    tiny_dataset: TinyDataset, tiny_packed: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_packed / "test.sqlite", tmp_path / "val.sqlite")
    index = index_of(tiny_dataset, tmp_path, "test")
    assert index.digest() == index_of(tiny_dataset, tiny_packed, "test").digest()
    assert probe(index.path(0)) == TINY_FRAMES


def test_unsafe_and_duplicate_names_in_a_store_are_reported(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    names = {"_00": "../outside", "_01": "train_action_0/x.mp4", "_02": "train_action_0/x.avi", "_03": "a/b/c"}
    repack(
        tmp_path / "train.sqlite",
        tiny_dataset.frames,
        "train",
        lambda name: names.get(name[-3:], name) if name.startswith("train_action_0") else name,
    )
    problems = problems_of(tiny_dataset.splits, tmp_path, ["train"])
    assert len(problems) == 3
    assert "'../outside' points outside the data root" in problems[0]
    assert "have the same video name" in problems[1]
    assert "'a/b/c' is not of the form class/video" in problems[2]


def test_a_damaged_store_is_reported_once(tiny_dataset: TinyDataset, tiny_packed: Path, tmp_path: Path) -> None:
    content = (tiny_packed / "train.sqlite").read_bytes()
    (tmp_path / "train.sqlite").write_bytes(content[: len(content) // 2])
    assert "is damaged" in problems_of(tiny_dataset.splits, tmp_path, ["train"])[0]


def test_splits_are_listed_without_opening_a_video(
    tiny_dataset: TinyDataset, tiny_packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", lambda *arguments, **options: pytest.fail("an image was opened"))
    assert len(index_of(tiny_dataset, tiny_packed)) == 36


def test_the_check_before_a_run_finds_the_broken_video_in_a_store(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    cut = tmp_path / "cut.jpg"
    cut.write_bytes((tiny_dataset.frames / VIDEO / "00001.jpg").read_bytes()[:300])
    videos = dict(tiny_frame_files(tiny_dataset.frames, "train")) | {VIDEO: [cut]}
    write_packed(tmp_path / "train.sqlite", videos.items())
    (problem,) = unreadable_videos([index_of(tiny_dataset, tmp_path)], 4, 3)
    assert f"frame 0 of {VIDEO}" in problem


def test_a_split_prefers_its_own_store(tiny_dataset: TinyDataset, tiny_packed: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_packed, tmp_path / "packed")
    shutil.copy(tiny_packed / "test.sqlite", tmp_path / "packed/train.sqlite")  # the classes of test are in both
    assert index_of(tiny_dataset, tmp_path / "packed", "test").path(0).is_relative_to(tmp_path / "packed/test.sqlite")
