"""Folders with a user's own videos."""

from pathlib import Path

from episodes.search import SPLITS
from tests.helpers.raw_data import render

FOLDERS = ["CutBread", "pour_water", "stir-soup", "Peel", "fry egg", "knead"]


def kitchen(root: Path, videos: int = 2) -> Path:
    for folder in FOLDERS:
        for number in range(videos):
            render(root / "raw" / folder / f"{folder} & {number}.mp4")
    return root / "raw"


def two_classes_each(videos: int = 1) -> dict[str, list[str]]:
    """Returns lists of the kitchen data: split -> the first videos of two of its classes."""
    folders = {split: FOLDERS[2 * i : 2 * i + 2] for i, split in enumerate(SPLITS)}
    return {
        split: [f"{name}/{name} & {n}" for name in names for n in range(videos)] for split, names in folders.items()
    }
