"""The class file of a data set: which classes train, val and test have, and what they are called."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from episodes.search import SPLITS, unsafe
from utils.errors import UserError

CLASS_FILE = "classes.yaml"
MOST_PROBLEMS_SHOWN = 30


@dataclass(frozen=True)
class ClassEntry:
    """One action class: its folder on disk, its name in a prompt, and how many videos it should have."""

    folder: str
    prompt: str
    expected_videos: int


@dataclass(frozen=True)
class ClassList:
    """A class file: name of the data set, whether lists name its videos, mirroring, the classes of each split."""

    path: Path
    dataset: str
    listed: bool
    horizontal_flip: bool
    classes: dict[str, list[ClassEntry]]


def read_class_list(path: Path, problems: list[str]) -> ClassList:
    """Reads a class file; what is wrong with single classes joins `problems`.

    Raises:
        UserError: the file cannot be read, or is not of the right form.
    """
    data = _read_class_file(path)
    classes = {split: _classes(data, split, path, problems) for split in SPLITS}
    _check_disjoint(classes, path, problems)
    return ClassList(path, data["dataset"], data["videos"] == "listed", data["horizontal_flip"], classes)


def raise_problems(problems: Sequence[str]) -> None:
    """Raises one UserError with all problems, a line each, unless there are none."""
    if not problems:
        return
    shown = list(dict.fromkeys(problems))
    more = [f"... and {len(shown) - MOST_PROBLEMS_SHOWN} more problems"] if len(shown) > MOST_PROBLEMS_SHOWN else []
    raise UserError("\n".join(shown[:MOST_PROBLEMS_SHOWN] + more))


def _read_class_file(path: Path) -> dict:
    """The content of a class file with the right keys, whose classes are still to be looked at."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    expected = {"dataset", "videos", "horizontal_flip", *SPLITS}
    if not isinstance(data, dict) or set(data) != expected:
        found = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise UserError(f"{path}: expected the keys {', '.join(sorted(expected))}, found {found}")
    problems = []
    if not isinstance(data["dataset"], str) or not data["dataset"].isprintable():
        problems.append(f"{path}: expected a name after 'dataset:', found {data['dataset']!r}")
    if data["videos"] not in ("all", "listed"):
        problems.append(f"{path}: expected 'videos: all' or 'videos: listed', found {data['videos']!r}")
    if not isinstance(data["horizontal_flip"], bool):
        problems.append(
            f"{path}: expected 'horizontal_flip: true' or 'horizontal_flip: false', found {data['horizontal_flip']!r}"
        )
    for split in SPLITS:
        if not isinstance(data[split], list | None):
            problems.append(f"{path}: expected a list of classes after '{split}:', found {data[split]!r}")
    raise_problems(problems)
    return data


def _classes(data: dict, split: str, path: Path, problems: list[str]) -> list[ClassEntry]:
    """The classes of one split that are what they should be; what is wrong with the others joins `problems`."""
    entries = []
    for number, item in enumerate(data[split] or [], start=1):
        good = (
            isinstance(item, dict)
            and set(item) == {"folder", "prompt", "videos"}
            and isinstance(item["folder"], str)
            and isinstance(item["prompt"], str)
            and type(item["videos"]) is int  # YAML's true is an int to isinstance
        )
        if not good:
            problems.append(
                f"{path}: class {number} of {split}: expected {{folder: name, prompt: text, videos: count}}, "
                f"found {item!r}"
            )
        elif reason := unsafe(item["folder"], parts=1):
            problems.append(f"{path}: class {number} of {split}: folder {item['folder']!r} {reason}")
        else:
            entries.append(ClassEntry(item["folder"], item["prompt"], item["videos"]))
    return entries


def _check_disjoint(classes: dict[str, list[ClassEntry]], path: Path, problems: list[str]) -> None:
    """Notes every class that is named a second time, in one split or in two."""
    seen: dict[str, str] = {}
    for split, entries in classes.items():
        for entry in entries:
            if entry.folder in seen:
                where = (
                    f"twice in {split}" if seen[entry.folder] == split else f"in {seen[entry.folder]} and in {split}"
                )
                problems.append(f"{path}: class {entry.folder!r} is {where}; each class belongs to one split, once")
            seen.setdefault(entry.folder, split)
