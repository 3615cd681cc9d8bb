"""Finds the list of each split in the folders that public code ships, or the reason why it is missing."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from episodes.preparation.list_lines import parsed_line
from episodes.preparation.list_tables import table_lines
from episodes.search import SPLITS
from utils.errors import UserError, reason_of
from utils.files import is_lfs_pointer, raise_if_lfs_pointer

KNOWN_NAMES = ("{}list03.txt", "{}list07.txt", "{}_few_shot.txt")
LIST_SUFFIXES = (".txt", ".list")
TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")  # lists only where there is none of the above
OTHER_SUFFIXES = frozenset({".pkl", ".pickle", ".npy", ".npz", ".xml", ".yaml", ".yml", ".xlsx"})
EXPECTED = "trainlist03.txt or train_few_shot.txt with lines such as class/video"
FEW_SHOT_STEMS = {"base": "train", "novel": "test"}  # base.json, val.json and novel.json
OTHER_WORDS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}


def list_file(folder: Path, split: str) -> Path:
    """Returns the list of a split: testlist03.txt, testlist07.txt, test_few_shot.txt, else one named by the split.

    A file without any line that names a video is not a list (`test_class2id.txt` beside `testlist03.txt`).

    Raises:
        UserError: there is no such folder, no such list, or more than one; the message names the usual causes.
    """
    if not folder.is_dir():
        raise UserError(f"--lists {folder} is not a folder; use the folder with the train, val and test lists")
    named = _named_files(folder, split)
    reasons = {path: why_not_list(path) for path in named if path.suffix.lower() in LIST_SUFFIXES + TABLE_SUFFIXES}
    lists = [path for path, reason in reasons.items() if not reason]
    lists = [path for path in lists if path.suffix.lower() in LIST_SUFFIXES] or lists
    known = [path for path in lists if path.name.lower() in [name.format(split) for name in KNOWN_NAMES]]
    chosen = known or [path for path in lists if path.name.lower().startswith(split)] or lists
    if len(chosen) > 1:  # lines such as `kick 1` are a class index if another file has class/video lines
        chosen = [path for path in chosen if _has_folders(path)] or chosen
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        raise UserError(
            f"--lists {folder}: expected one {split} list, found {', '.join(path.name for path in chosen)}; "
            "keep the lists of one split of the benchmark in a separate folder"
        )
    raise UserError(
        f"--lists {folder}: expected one {split} list, such as {split}list03.txt, {_found(folder, reasons, named)}"
    )


def has_list(folder: Path, split: str) -> bool:
    """Returns whether a folder has a file with the name of a split's list, in any format."""
    return not folder.is_dir() or bool(_named_files(folder, split))


def unused_lists(folder: Path) -> list[str]:
    """Returns the names of the lists in a folder that `list_file` ignores, such as testlist03_old.txt."""
    return [
        path.name
        for split in SPLITS
        for path in _named_files(folder, split)
        if path.suffix.lower() in LIST_SUFFIXES and path != list_file(folder, split) and not why_not_list(path)
    ]


def list_lines(path: Path) -> list[str]:
    """Returns the lines of a list without byte order mark, surrounding spaces and Windows line ends.

    Raises:
        UserError: the file cannot be read as text, or is a table in an unknown format.
    """
    raise_if_lfs_pointer(path)
    try:
        return table_lines(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(
            f"{path}: is a table in an unknown format ({reason_of(error)}); convert it to {EXPECTED}"
        ) from error


def why_not_list(path: Path) -> str:
    """Returns the reason why a text file is not a list of videos, or ""."""
    if is_lfs_pointer(path):
        return "it is a Git LFS pointer: run git lfs pull in the repository that it comes from"
    try:
        lines = [line for line in list_lines(path) if line]
    except UserError:
        return ""  # its reader reports it
    start = lines[0] if lines else ""
    if start.lower().startswith(("<!doctype", "<html")):
        return "it is a web page: download the raw file"
    if lines and not any(parsed_line(line).names_video for line in lines):
        return "none of its lines names a class and a video"
    return ""


def _has_folders(path: Path) -> bool:
    return any(parsed_line(line).folders for line in list_lines(path))


def _named_files(folder: Path, split: str) -> list[Path]:
    """Returns files whose names begin with a split's name or contain it, but no other split's, as a word."""
    files = []
    for path in sorted(folder.iterdir()):
        stem = path.stem.lower()
        words = {OTHER_WORDS.get(word, word) for word in re.split(r"[^a-z]+", FEW_SHOT_STEMS.get(stem, stem))}
        if path.is_file() and (path.name.lower().startswith(split) or words.intersection(SPLITS) == {split}):
            files.append(path)
    return files


def _found(folder: Path, reasons: dict[Path, str], named: Sequence[Path]) -> str:
    """Returns a phrase on the files found instead of a list, and what to do."""
    for path, reason in reasons.items():
        return f"found {path.name}, but {reason}"
    for path in named:
        if path.suffix.lower() in OTHER_SUFFIXES:
            return f"found {path.name}: convert it to {EXPECTED}"
    below = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and _contains_lists(path)]
    if below:
        return f"found none; there are lists one level down, in {', '.join(below)}: use one of these"
    return "found none; copy it from the code of a paper that uses the same split"


def _contains_lists(folder: Path) -> bool:
    suffixes = LIST_SUFFIXES + TABLE_SUFFIXES
    return any(path.suffix.lower() in suffixes for split in SPLITS for path in _named_files(folder, split))
