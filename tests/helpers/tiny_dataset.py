"""A tiny data set of real videos: its names, its frames and its files."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

TINY_CLASSES = {"train": 6, "val": 5, "test": 5}
TINY_VIDEOS_PER_CLASS = 6
TINY_FRAMES, TINY_HEIGHT, TINY_WIDTH = 12, 32, 40


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


def tiny_frame_files(frames: Path, split: str) -> list[tuple[str, list[Path]]]:
    """Returns the name `class/video` and the frames in order of every video of a split."""
    names = [f"{name}/{video}" for name in tiny_class_names(split) for video in tiny_video_names(name)]
    return [(name, sorted((frames / name).iterdir())) for name in names]
