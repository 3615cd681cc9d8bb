"""The annotations of Something-Something V2: the template of each video.

    something-something-v2-train.json, -validation.json   [{"id": "78687", "template": "Closing [something]", ...}, ...]
    labels.json                                           {"Closing something": "4", ...}

They are optional. If they are next to the videos or the lists, each listed video is compared with them, which finds
lists whose classes are numbered in another order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from episodes.preparation.names import class_key
from episodes.preparation.raw_lists import ListedVideo
from episodes.splits import ClassEntry
from utils.errors import UserError, counted
from utils.files import raise_if_lfs_pointer

ANNOTATION_FILES = ("something-something-v2-train.json", "something-something-v2-validation.json", "train.json",
                    "validation.json")  # fmt: skip
# Folders of the label package, relative to the videos or the lists.
FOLDERS = (".", "labels", "annotations", "20bn-something-something-download-package-labels/labels")
LABEL_FILES = ("labels.json", "something-something-v2-labels.json")
MAX_SHOWN = 5


def templates(folders: Sequence[Path]) -> dict[str, str]:
    """Returns video id -> template, from every annotation file in the folders; empty if there are none.

    Raises:
        UserError: a file does not have the expected form, or has an id that is not a number.
    """
    template_of: dict[str, str] = {}
    for path in _files(folders, ANNOTATION_FILES):
        entries = _read_json(path)
        is_valid = isinstance(entries, list) and all(
            isinstance(entry, dict) and isinstance(entry.get("template"), str) for entry in entries
        )
        if not is_valid:
            raise UserError(
                f"{path}: expected a list of videos, each with an id and a template, as distributed with the data set"
            )
        for entry in entries:
            number = str(entry.get("id"))
            if not number.isdecimal():  # it becomes part of a path
                raise UserError(f"{path}: expected a number as the id, found {number!r}")
            template_of[number] = entry["template"]
    return template_of


def check_labels(folders: Sequence[Path], classes: Mapping[str, Sequence[ClassEntry]]) -> dict[str, str]:
    """Returns number -> label from labels.json; empty if there is no such file.

    Raises:
        UserError: it does not have the expected form, or a class of the class list is missing in it.
    """
    names: dict[str, str] = {}
    for path in _files(folders, LABEL_FILES):
        labels = _read_json(path)
        if not isinstance(labels, dict):
            raise UserError(f"{path}: expected labels and their numbers, as distributed with the data set")
        known = {class_key(label) for label in labels}
        missing = [
            entry.prompt for split in classes.values() for entry in split if class_key(entry.prompt) not in known
        ]
        if missing:
            raise UserError(
                f"{path}: {counted(len(missing), 'class')} of the class list not found, the first: {missing[0]!r}"
            )
        names |= {str(number): label for label, number in labels.items()}
    return names


def check_classes(
    lists: Mapping[str, Sequence[ListedVideo]],
    classes: Mapping[str, Sequence[ClassEntry]],
    template_of: Mapping[str, str],
) -> None:
    """Raises UserError if the annotations and the lists disagree on the class of a video."""
    wrong = []
    for split, listed in lists.items():
        prompts = {entry.folder: entry.prompt for entry in classes[split]}
        for video in listed:
            template = template_of.get(video.name)
            if template is not None and class_key(template) != class_key(prompts[video.folder]):
                wrong.append(f"{video.where}: {prompts[video.folder]!r} in the list, {template!r} in the annotations")
    if wrong:
        raise UserError(
            f"{len(wrong)} listed videos have another class in the annotations; use lists whose classes are numbered "
            "as in the class list:\n" + "\n".join(wrong[:MAX_SHOWN])
        )


def _files(folders: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Returns the files of these names, in the folders and in the subfolders of the label package."""
    places = [folder / below for folder in folders for below in FOLDERS]
    return [place / name for place in dict.fromkeys(places) for name in names if (place / name).is_file()]


def _read_json(path: Path) -> Any:
    raise_if_lfs_pointer(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
