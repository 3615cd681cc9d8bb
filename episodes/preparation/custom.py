"""A data set of one's own: a folder of class folders -> a class list with train, val and test classes of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from episodes.preparation.names import class_key, prompt_of, why_not_storable
from episodes.preparation.raw_layouts import raw_videos
from episodes.preparation.raw_lists import list_lines
from episodes.search import SPLITS
from utils.errors import UserError

USUAL_WAY = 5
HEADER = """\
# The classes of this data set, written once by `python run/prepare.py custom` and yours to edit.
# folder: the class's folder; prompt: what CLIP's text tower reads; videos: how many there were.
# horizontal_flip: set it to true where left and right do not matter; training clips are then mirrored at random.
"""


def count_videos(root: Path, leave_out: Collection[Path]) -> dict[str, int]:
    """Class folder -> videos in it, for the folders of a folder that hold any.

    Raises:
        UserError: there is none, or the name of one cannot stand in a list.
    """
    counts: dict[str, int] = {}
    for video in raw_videos(root, leave_out):
        if video.above:
            counts[video.above[0]] = counts.get(video.above[0], 0) + 1
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

    Args:
        folders: all classes.
        ratios: of train, val and test; they are made to sum to one.
        seed: 0 or more.

    Raises:
        UserError: ratios or a number of classes with which a split would be empty.
    """
    if len(ratios) != len(SPLITS) or min(ratios) <= 0 or seed < 0:
        raise UserError(
            f"--ratios {' '.join(map(str, ratios))} --seed {seed}: expected three ratios above 0, for train, val and "
            "test, and a seed of 0 or more"
        )
    names = sorted(folders)
    if len(names) < len(SPLITS):
        raise UserError(f"{len(names)} classes cannot be shared out to train, val and test; at least 3 are needed")
    shuffled = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    val, test = (max(1, round(len(names) * ratio / sum(ratios))) for ratio in ratios[1:])
    train = max(1, len(names) - val - test)
    val = min(val, len(names) - train - 1)
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
        path = lists / f"{split}list03.txt"
        if not path.is_file():
            raise UserError(f"--lists {lists}: expected {path.name} with a class/video line for each video, found none")
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


def class_file(dataset: str, split: Mapping[str, Sequence[str]], counts: Mapping[str, int]) -> str:
    """The text of a new classes.yaml."""
    content: dict[str, object] = {"dataset": dataset, "videos": "listed", "horizontal_flip": False}
    text = HEADER + yaml.safe_dump(content, sort_keys=False)
    for name, folders in split.items():
        text += f"{name}:\n"
        for folder in folders:
            entry = {"folder": folder, "prompt": prompt_of(folder), "videos": counts[folder]}
            line = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
            text += f"- {line}"
    return text


def config_block(dataset: str, out: Path, smallest_split: int) -> str:
    """The lines to paste into a config."""
    way = ""
    if smallest_split < USUAL_WAY:  # an episode needs two classes
        way = f"\n\nTRAIN:\n  WAY: {max(2, smallest_split)}   # the smallest split has {smallest_split}"
    return (
        f"DATA:\n  DATASET: {dataset}\n  DATA_DIR: {(out / 'packed').as_posix()}\n"
        f"  SPLIT_DIR: {(out / 'splits').as_posix()}{way}"
    )
