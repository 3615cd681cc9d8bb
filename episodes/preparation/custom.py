"""A data set of one's own: a folder of class folders -> a class list with train, val and test classes of its own."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from episodes.class_lists import ClassEntry, ClassList, raise_problems
from episodes.preparation.names import class_key, prompt_of, why_not_storable
from episodes.preparation.raw_layouts import raw_videos
from episodes.preparation.raw_lists import list_file, list_lines
from episodes.search import SPLITS
from utils.config_yaml import one_line
from utils.errors import UserError

USUAL_WAY = 5
SMALLEST_WAY = 2  # classes of one split in an episode
HEADER = """\
# The classes of this data set, written once by `python run/prepare.py custom` and yours to edit.
# folder: the class's folder; prompt: what CLIP's text tower reads; videos: how many there were, and should be.
# horizontal_flip: set it to true where left and right do not matter; training clips are then mirrored at random.
"""


def count_videos(root: Path, leave_out: Collection[Path]) -> dict[str, int]:
    """Class folder -> videos in it, for the folders of a folder that hold any.

    Raises:
        UserError: there is none, the name of one cannot stand in a list, or two videos of a class have one name.
    """
    found: dict[str, dict[str, Path]] = {}
    problems = []
    for video in raw_videos(root, leave_out):
        if video.above:
            path = found.setdefault(video.above[0], {}).setdefault(video.name, video.path)
            if path != video.path:
                problems.append(f"{video.path}: {path} is the same video by name; rename or remove one of them")
    raise_problems(problems)
    counts = {folder: len(videos) for folder, videos in found.items()}
    if not counts:
        raise UserError(f"--videos {root}: expected a folder for each class with its videos in it, found none")
    keys: dict[str, str] = {}
    for folder in counts:
        if reason := why_not_storable(folder):
            raise UserError(f"{root / folder}: {reason}")
        other = keys.setdefault(class_key(folder), folder)
        if other != folder:
            raise UserError(f"{root}: the folders {other!r} and {folder!r} are one class by name; rename one of them")
    return counts


def draw_split(folders: Collection[str], ratios: Sequence[float], seed: int) -> dict[str, list[str]]:
    """Share classes out to train, val and test at random, a pure function of its arguments.

    Each split gets a class, and where there are enough, as many as an episode needs, whatever the ratios.

    Args:
        folders: all classes.
        ratios: of train, val and test; they are made to sum to one.
        seed: 0 or more.

    Raises:
        UserError: ratios or a number of classes with which a split would be empty.
    """
    if len(ratios) != len(SPLITS) or not all(0 < ratio < math.inf for ratio in ratios) or seed < 0:
        raise UserError(
            f"--ratios {' '.join(map(str, ratios))} --seed {seed}: expected three ratios above 0, for train, val and "
            "test, and a seed of 0 or more"
        )
    names = sorted(folders)
    if len(names) < len(SPLITS):
        raise UserError(
            f"{len(names)} classes cannot be shared out to train, val and test; at least {SMALLEST_WAY * len(SPLITS)} "
            f"are needed, as an episode needs {SMALLEST_WAY} of one split"
        )
    least = min(SMALLEST_WAY, len(names) // len(SPLITS))
    shuffled = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    val, test = (max(least, round(len(names) * ratio / sum(ratios))) for ratio in ratios[1:])
    train = max(least, len(names) - val - test)
    val = min(val, len(names) - train - least)
    return {
        "train": sorted(shuffled[:train]),
        "val": sorted(shuffled[train : train + val]),
        "test": sorted(shuffled[train + val :]),
    }


def split_of_lists(lists: Path, folders: Collection[str]) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Share classes out as the user's lists do: each split has the classes that its list names.

    Returns:
        split -> class folders, and class folder -> videos that the lists name of it.

    Raises:
        UserError: a list is missing, names a class that has no folder, or one that another list names too.
    """
    folder_of_key = {class_key(folder): folder for folder in folders}
    split_of: dict[str, str] = {}
    counts: dict[str, int] = {}
    for split in SPLITS:
        path = list_file(lists, split)
        for line in filter(None, list_lines(path)):
            folder = folder_of_key.get(class_key(line.split("/")[0]))
            if folder is None:
                raise UserError(f"{path}: class {line.split('/')[0]!r} has no folder among the videos")
            if split_of.setdefault(folder, split) != split:
                raise UserError(
                    f"{path}: class {folder!r} is in the {split_of[folder]} list too; each class belongs to one split"
                )
            counts[folder] = counts.get(folder, 0) + 1
    return {split: sorted(folder for folder in counts if split_of[folder] == split) for split in SPLITS}, counts


def check_enough_classes(class_list: ClassList, remedy: str) -> None:
    """Raises UserError, with the remedy, when a split has fewer classes than an episode needs."""
    numbers = {split: len(entries) for split, entries in class_list.classes.items()}
    few = [
        f"{split} has {number} class{'' if number == 1 else 'es'}"
        for split, number in numbers.items()
        if number < SMALLEST_WAY
    ]
    if few:
        raise UserError(f"{', '.join(few)}, and an episode needs {SMALLEST_WAY} of one split: {remedy}")


def new_class_list(
    path: Path, dataset: str, split: Mapping[str, Sequence[str]], counts: Mapping[str, int]
) -> ClassList:
    """The class list of a new data set, to be written to `path`; its prompts come from the names of the folders.

    Raises:
        UserError: the name of the data set cannot stand in a class file.
    """
    if not dataset or not dataset.isprintable():
        raise UserError(f"--name {dataset!r}: expected a name that can be printed; give another one")
    classes = {
        name: [ClassEntry(folder, prompt_of(folder), counts[folder]) for folder in split[name]] for name in SPLITS
    }
    return ClassList(path, dataset, listed=True, horizontal_flip=False, classes=classes)


def class_file(class_list: ClassList) -> str:
    """The text of a new classes.yaml, which reads as this class list."""
    flip = one_line(class_list.horizontal_flip)
    text = f"{HEADER}dataset: {one_line(class_list.dataset)}\nvideos: listed\nhorizontal_flip: {flip}\n"
    for split, entries in class_list.classes.items():
        text += f"{split}:\n"
        for entry in entries:
            line = one_line({"folder": entry.folder, "prompt": entry.prompt, "videos": entry.expected_videos})
            text += f"- {line}\n"
    return text


def config_block(dataset: str, out: Path, smallest_split: int) -> str:
    """The lines to paste into a config."""
    way = ""
    if smallest_split < USUAL_WAY:
        way = f"\n\nTRAIN:\n  WAY: {smallest_split}   # the smallest split has {smallest_split}"
    return (
        f"DATA:\n  DATASET: {one_line(dataset)}\n  DATA_DIR: {one_line((out / 'packed').as_posix())}\n"
        f"  SPLIT_DIR: {one_line((out / 'splits').as_posix())}{way}"
    )
