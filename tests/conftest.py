"""Shared fixtures: a tiny data set of real videos in every supported layout."""

import logging
import os
import shutil
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from episodes.demo.render import write_video
from episodes.packed import write_packed
from utils.files import CACHE_VARIABLE

# Files that start processes or train often. The longest run first, so that they do not start last on one core.
SLOW = (
    "document_commands", "distributed", "elastic", "report", "released", "benchmarks", "resume", "evaluation", "parity",
    "features*", "terminal", "prepare_*", "hostile_*", "kill", "memory_settings", "bad_clips", "commands", "compare",
    "compile", "demo", "export", "full_disk", "numerics", "otam_kernel", "packed", "predict", "profile", "rejection",
    "statistics", "sweep*", "tasks", "tracking", "timeline", "trainable", "weights", "workers",
)  # fmt: skip

TINY_CLASSES = {"train": 6, "val": 5, "test": 5}
TINY_VIDEOS_PER_CLASS = 6
TINY_FRAMES, TINY_HEIGHT, TINY_WIDTH = 12, 32, 40


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of the slow files and puts them first, in the order of SLOW."""

    def place(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(SLOW) if item.path.match(f"test_{name}.py")), len(SLOW))

    for item in items:
        if place(item) < len(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=place)


MakeReport = Generator[None, pytest.TestReport, pytest.TestReport]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> MakeReport:
    """Escapes what is not UTF-8 in captured output, such as names of files; pytest-xdist cannot send it."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


@dataclass(frozen=True)
class TinyDataset:
    """A data set on disk: train 6, val 5 and test 5 classes, 6 videos of 12 frames of 32 x 40 pixels each.

    videos: root of <class>/<video>.mp4. frames: root of <class>/<video>/*.jpg. split_frames: root of
    <split>/<class>/<video>/*.jpg. splits: folder with classes.yaml (`videos: all`). listed_splits: the same with
    `videos: listed` and the three lists. The session shares it, so a test that changes files works on a copy.
    """

    videos: Path
    frames: Path
    split_frames: Path
    splits: Path
    listed_splits: Path


def tiny_class_names(split: str) -> list[str]:
    return [f"{split}_action_{number}" for number in range(TINY_CLASSES[split])]


def tiny_video_names(class_name: str) -> list[str]:
    return [f"{class_name}_{number:02d}" for number in range(TINY_VIDEOS_PER_CLASS)]


def tiny_video_frames(video: str) -> np.ndarray:
    """Draws a bright square that moves over coloured noise, different for each video name: uint8 [T, H, W, 3]."""
    rng = np.random.default_rng(zlib.crc32(video.encode()))
    frames = np.empty((TINY_FRAMES, TINY_HEIGHT, TINY_WIDTH, 3), dtype=np.uint8)
    frames[:] = rng.integers(0, 128, size=(TINY_HEIGHT, TINY_WIDTH, 3), dtype=np.uint8)
    top = rng.integers(0, TINY_HEIGHT - 8)
    for number, frame in enumerate(frames):
        frame[top : top + 8, 2 * number : 2 * number + 8] = 255
    return frames


def write_split_files(folder: Path, listed: bool) -> None:
    """Writes the class file of the tiny data set and, where it is listed, the three lists."""
    folder.mkdir(parents=True)
    content: dict[str, object] = {
        "dataset": "tiny",
        "videos": "listed" if listed else "all",
        "horizontal_flip": True,
    }
    for split in TINY_CLASSES:
        content[split] = [
            {"folder": name, "prompt": name.replace("_", " "), "videos": TINY_VIDEOS_PER_CLASS}
            for name in tiny_class_names(split)
        ]
        if listed:
            lines = [f"{name}/{video}\n" for name in tiny_class_names(split) for video in tiny_video_names(name)]
            (folder / f"{split}list03.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "classes.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the caches of commands out of the home directory."""
    os.environ[CACHE_VARIABLE] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _leave_logging_alone() -> Iterator[None]:
    """Restores the root logger, which a run configures."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """Returns the tiny data set, written once per session."""
    root = tmp_path_factory.mktemp("tiny")
    dataset = TinyDataset(
        root / "videos", root / "frames", root / "split_frames", root / "splits", root / "listed_splits"
    )
    for split in TINY_CLASSES:
        for name in tiny_class_names(split):
            for video in tiny_video_names(name):
                frames = tiny_video_frames(video)
                write_video(dataset.videos / name / f"{video}.mp4", frames)
                for folder in (dataset.frames / name / video, dataset.split_frames / split / name / video):
                    folder.mkdir(parents=True)
                    for number, frame in enumerate(frames, start=1):
                        Image.fromarray(frame).save(folder / f"{number:05d}.jpg", quality=95)
    write_split_files(dataset.splits, listed=False)
    write_split_files(dataset.listed_splits, listed=True)
    return dataset


@pytest.fixture
def own(tiny_dataset: TinyDataset, tmp_path: Path) -> Iterator[TinyDataset]:
    """Returns a copy of the tiny data set for tests that change its files."""
    copy = TinyDataset(*(tmp_path / name for name in ("videos", "frames", "split_frames", "splits", "listed_splits")))
    shutil.copytree(tiny_dataset.videos, copy.videos)
    shutil.copytree(tiny_dataset.splits, copy.splits)
    shutil.copytree(tiny_dataset.listed_splits, copy.listed_splits)
    yield copy
    shutil.rmtree(tmp_path)  # thousands of files over all tests, slow to remove once they are on the disk


@pytest.fixture(scope="session")
def tiny_packed(tiny_dataset: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the frame folders of the tiny data set as a packed store per split; the session shares it."""
    root = tmp_path_factory.mktemp("tiny_packed")
    for split in TINY_CLASSES:
        write_packed(root / f"{split}.sqlite", tiny_frame_files(tiny_dataset.frames, split))
    return root


def tiny_frame_files(frames: Path, split: str) -> list[tuple[str, list[Path]]]:
    """Returns the name `class/video` and the frames in order of every video of a split."""
    names = [f"{name}/{video}" for name in tiny_class_names(split) for video in tiny_video_names(name)]
    return [(name, sorted((frames / name).iterdir())) for name in names]
