"""Custom data: makes a class list with train, val and test classes from a folder of class folders."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from episodes.preparation.custom_config import MIN_WAY
from episodes.preparation.list_files import OTHER_WORDS
from episodes.preparation.names import class_key, prompt_of, why_not_storable
from episodes.preparation.raw_layouts import RawVideo, no_videos_error, raw_videos
from episodes.preparation.raw_lists import Evidence, read_lists
from episodes.search import OPTIONAL_SPLITS, SPLITS
from episodes.splits import ClassEntry, ClassList, raise_problems
from utils.errors import UserError, counted
from utils.yaml_text import one_line

HEADER = """\
# The classes of this data set, written once by `python run/prepare.py custom` and yours to edit.
# folder: the class's folder; prompt: its text for CLIP's text tower; videos: the expected number of videos.
# horizontal_flip: set it to true if left and right do not matter; training clips are then mirrored at random.
"""


@dataclass(frozen=True)
class OwnClasses:
    """The class folders of a data set.

    Attributes:
        videos: class folder -> names of its videos.
        split: split -> class folders if folders such as train/, val/ and test/ contain the classes, else None.
    """

    videos: dict[str, set[str]]
    split: dict[str, list[str]] | None

    @property
    def counts(self) -> dict[str, int]:
        """Class folder -> number of its videos."""
        return {folder: len(names) for folder, names in self.videos.items()}

    def class_of(self, video: str) -> str | None:
        """Returns the class folder of a video; None unless exactly one has a video of that name."""
        folders = [folder for folder, names in self.videos.items() if video in names]
        return folders[0] if len(folders) == 1 else None


def find_classes(root: Path, leave_out: Collection[Path]) -> OwnClasses:
    """Returns the class folders of a folder that contain videos, with or without split folders above them.

    Raises:
        UserError: there are none, a name cannot be written in a list, two videos of a class have one name, or a
            class is in two split folders.
    """
    raw = [video for video in raw_videos(root, leave_out) if video.above]
    if not raw:
        raise no_videos_error(root, "a folder for each class with its videos in it")
    level = 1 if all(len(video.above) > 1 and _split_of_folder(video.above[0]) for video in raw) else 0
    _check_not_too_high(root, raw, level)
    paths_of_class: dict[str, dict[str, Path]] = {}
    splits: dict[str, str] = {}
    problems = []
    for video in raw:
        folder, split = video.above[level], _split_of_folder(video.above[0]) if level else ""
        if splits.setdefault(folder, split) != split:
            problems.append(
                f"{root}: class {folder!r} is in {splits[folder]} and in {split}, but a class belongs to one split; "
                "put all class folders into one folder, from which the splits are drawn"
            )
            continue
        path = paths_of_class.setdefault(folder, {}).setdefault(video.name, video.path)
        if path != video.path:
            problems.append(_same_name(path, video.path))
    raise_problems(problems)
    _check_names(root, paths_of_class)
    by_split = {split: sorted(folder for folder in splits if splits[folder] == split) for split in SPLITS}
    return OwnClasses({folder: set(videos) for folder, videos in paths_of_class.items()}, by_split if level else None)


def _same_name(first: Path, second: Path) -> str:
    """Returns the message for two videos of a class with one name."""
    if first.is_dir() and second.is_dir():  # v1/cam0 and v2/cam0, or person1/v1 and person2/v1
        return (
            f"{first.parent} and {second.parent} both contain a folder of images called {second.name}: if they are two "
            f"videos, put the frames of each directly into its folder; else rename one {second.name}"
        )
    return f"{second}: {first} has the same video name; rename or remove one of them"


def _split_of_folder(name: str) -> str:
    """Returns the split that the name of a folder means, or ""."""
    name = name.lower()
    return OTHER_WORDS.get(name, name if name in SPLITS else "")


def _check_not_too_high(root: Path, raw: Sequence[RawVideo], level: int) -> None:
    """Raises UserError if the class folders are one level down, in the only folder."""
    tops, below = {video.above[0] for video in raw}, {video.above[:2] for video in raw}
    if not level and len(tops) == 1 and len(below) > 1 and all(len(video.above) > 1 for video in raw):
        raise UserError(f"--videos {root}: the class folders are one level down: use {root / tops.pop()}")


def _check_names(root: Path, folders: Collection[str]) -> None:
    """Raises UserError for a name that a list cannot contain, and for two spellings of one class."""
    keys: dict[str, str] = {}
    for folder in folders:
        if reason := why_not_storable(folder):
            raise UserError(f"{root / folder}: {reason}")
        other = keys.setdefault(class_key(folder), folder)
        if other != folder:
            raise UserError(
                f"{root}: the folders {other!r} and {folder!r} have the same class name; rename one of them"
            )


def draw_split(folders: Collection[str], ratios: Sequence[float], seed: int) -> dict[str, list[str]]:
    """Assigns classes to train, val and test at random, a pure function of its arguments.

    Each split with a ratio above 0 gets at least one class and, if there are enough, as many as an episode needs.

    Args:
        folders: all classes.
        ratios: of train, val and test, in any unit; with 0, train or val has no classes.
        seed: 0 or more.

    Raises:
        UserError: unusable ratios, or fewer classes than splits that get some.
    """
    is_valid = len(ratios) == len(SPLITS) and all(0 <= ratio < math.inf for ratio in ratios) and ratios[-1] > 0
    if not is_valid or seed < 0:
        raise UserError(
            f"--ratios {' '.join(map(str, ratios))} --seed {seed}: expected a ratio of 0 or more for train and for val "
            "and one above 0 for test, and a seed of 0 or more"
        )
    names = sorted(folders)
    used = [split for split, ratio in zip(SPLITS, ratios, strict=True) if ratio]
    if len(names) < len(used):
        raise UserError(
            f"{counted(len(names), 'class')} cannot be divided among {', '.join(used)}; at least "
            f"{MIN_WAY * len(used)} are needed, as an episode needs {MIN_WAY} of one split"
        )
    least = min(MIN_WAY, len(names) // len(used))
    shuffled = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    val, test = (max(least, round(len(names) * ratio / sum(ratios))) if ratio else 0 for ratio in ratios[1:])
    train = max(least, len(names) - val - test) if ratios[0] else 0
    val = min(val, len(names) - train - least)
    return {
        "train": sorted(shuffled[:train]),
        "val": sorted(shuffled[train : train + val]),
        "test": sorted(shuffled[train + val :]),
    }


def split_of_lists(lists: Path, classes: OwnClasses) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Assigns to each split the classes in its list of the user; a split without a list has no classes.

    Returns:
        split -> class folders, and class folder -> its videos in the lists.

    Raises:
        UserError: a list cannot be read, names a class without a folder, or a class of another list.
    """
    entries = [ClassEntry(folder, folder, 0) for folder in classes.videos]
    evidence = Evidence(classes.class_of, exists=lambda folder, name: name in classes.videos[folder])
    split_of: dict[str, str] = {}
    counts: dict[str, int] = {}
    for split, videos in read_lists(lists, dict.fromkeys(SPLITS, entries), evidence, OPTIONAL_SPLITS).items():
        for video in videos:
            if split_of.setdefault(video.folder, split) != split:
                raise UserError(
                    f"{lists / video.where}: class {video.folder!r} is in the {split_of[video.folder]} list too; "
                    "each class belongs to one split"
                )
            counts[video.folder] = counts.get(video.folder, 0) + 1
    return {split: sorted(folder for folder in counts if split_of[folder] == split) for split in SPLITS}, counts


def check_enough_classes(class_list: ClassList, remedy: str) -> None:
    """Raises UserError, with the remedy, if a split has fewer classes than an episode needs.

    A data set without train classes is for testing only; one without val classes trains without validation.
    """
    numbers = {split: len(entries) for split, entries in class_list.classes.items()}
    few = [
        f"{split} has {counted(number, 'class')}"
        for split, number in numbers.items()
        if number < MIN_WAY and (number or split not in OPTIONAL_SPLITS)
    ]
    if few:
        raise UserError(f"{', '.join(few)}, but an episode needs {MIN_WAY} classes of one split: {remedy}")


def new_class_list(
    path: Path, dataset: str, split: Mapping[str, Sequence[str]], counts: Mapping[str, int]
) -> ClassList:
    """Returns the class list of a new data set, for the file `path`; folder names become prompts."""
    classes = {
        name: [ClassEntry(folder, prompt_of(folder), counts[folder]) for folder in split[name]] for name in SPLITS
    }
    return ClassList(path, dataset, listed=True, horizontal_flip=False, classes=classes)


def class_file(class_list: ClassList) -> str:
    """Returns the text of a classes.yaml with this class list."""
    flip = one_line(class_list.horizontal_flip)
    text = f"{HEADER}dataset: {one_line(class_list.dataset)}\nvideos: listed\nhorizontal_flip: {flip}\n"
    for split, entries in class_list.classes.items():
        text += f"{split}:\n"
        for entry in entries:
            line = one_line({"folder": entry.folder, "prompt": entry.prompt, "videos": entry.expected_videos})
            text += f"- {line}\n"
    return text
