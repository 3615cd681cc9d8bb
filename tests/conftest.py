"""Shared fixtures: a tiny data set of real videos in every supported layout."""

import itertools
import logging
import os
import shutil
from collections.abc import Generator, Iterator
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest
from PIL import Image

pytest.register_assert_rewrite("tests.helpers")

from episodes.demo.render import write_video
from episodes.packed import write_packed
from tests.helpers.tiny_dataset import (
    TINY_CLASSES,
    TinyDataset,
    tiny_class_names,
    tiny_frame_files,
    tiny_video_frames,
    tiny_video_names,
    write_split_files,
)
from utils.files import CACHE_VARIABLE

pytest_plugins = ("tests.helpers.searches", "tests.helpers.sweeps", "tests.helpers.videos")  # their fixtures

# Files that start processes or train often. The longest run first, so that they do not start last on one core.
SLOW = (
    "document_commands", "distributed", "elastic", "report", "released", "benchmarks", "resume", "evaluation", "parity",
    "features*", "terminal", "prepare_*", "hostile_*", "kill", "memory_settings", "bad_clips", "commands", "compare",
    "compile", "demo", "export", "full_disk", "numerics", "otam_kernel", "packed", "predict", "profile", "rejection",
    "statistics", "sweep*", "tasks", "tracking", "timeline", "trainable", "weights", "workers",
)  # fmt: skip


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


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the caches of commands out of the home directory."""
    os.environ[CACHE_VARIABLE] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _leave_logging_alone() -> Iterator[None]:
    """Restores the root logger, which a run configures; lines that wait for a log file are not those of this test."""
    handlers = [handler for handler in logging.root.handlers if not isinstance(handler, MemoryHandler)]
    logging.root.handlers[:], level = handlers, logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture(scope="session")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Returns names of new folders; pytest's own function lists all earlier folders to find the next number."""
    parent = tmp_path_factory.mktemp("folders")
    return (parent / str(number) for number in itertools.count())


@pytest.fixture
def tmp_path(_folders: Iterator[Path]) -> Path:
    """Returns an empty folder; unlike pytest's, its path does not contain words of the test, which messages repeat."""
    folder = next(_folders)
    folder.mkdir()
    return folder


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
