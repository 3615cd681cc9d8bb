"""The class file of a data set: which classes train, val and test have, and what they are called."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from episodes.search import SPLITS, composed, unsafe
from utils.errors import UserError
from utils.yaml_text import read_yaml_file

CLASS_FILE = "classes.yaml"
MOST_PROBLEMS_SHOWN = 30
LONGEST_SHOWN = 200  # characters of a text from a file that is quoted in a message


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


def read_class_list(path: Path, problems: list[str], needed: Sequence[str] = SPLITS) -> ClassList:
    """Reads a class file; problems with single classes of the needed splits are added to `problems`.

    A split without classes, or without its key, has an empty list.

    Raises:
        UserError: the file cannot be read, or is not of the right form.
    """
    data = _read_class_file(path, needed)
    classes = {split: _classes(data, split, path, problems if split in needed else []) for split in SPLITS}
    _check_disjoint(classes, path, problems)
    return ClassList(path, data["dataset"], data["videos"] == "listed", data["horizontal_flip"], classes)


def raise_problems(problems: Sequence[str]) -> None:
    """Raises one UserError with all problems, a line each, unless there are none."""
    if not problems:
        return
    shown = list(dict.fromkeys(problems))
    more = [f"... and {len(shown) - MOST_PROBLEMS_SHOWN} more problems"] if len(shown) > MOST_PROBLEMS_SHOWN else []
    raise UserError("\n".join(shown[:MOST_PROBLEMS_SHOWN] + more))


def quoted(value: object) -> str:
    """A value for a message, which may be as long as whoever wrote the file liked."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


def _read_class_file(path: Path, needed: Sequence[str]) -> dict:
    """The content of a class file with the right keys, whose classes are still to be checked."""
    data = read_yaml_file(path, str(path), "class list")
    required = {"dataset", "videos", "horizontal_flip"}
    if not required <= set(data) <= {*required, *SPLITS}:
        found = quoted(sorted(map(str, data)))
        expected = ", ".join(sorted({*required, *SPLITS}))
        raise UserError(f"{path}: expected the keys {expected} (unused splits may be left out), found {found}")
    data = dict.fromkeys(SPLITS) | data
    problems = []
    if not isinstance(data["dataset"], str) or not data["dataset"].isprintable():
        problems.append(f"{path}: expected a name after 'dataset:', found {quoted(data['dataset'])}")
    if data["videos"] not in ("all", "listed"):
        problems.append(f"{path}: expected 'videos: all' or 'videos: listed', found {quoted(data['videos'])}")
    if not isinstance(data["horizontal_flip"], bool):
        problems.append(
            f"{path}: expected 'horizontal_flip: true' or 'horizontal_flip: false', "
            f"found {quoted(data['horizontal_flip'])}"
        )
    for split in SPLITS:
        if split not in needed:
            data[split] = data[split] if isinstance(data[split], list) else None
        elif not isinstance(data[split], list | None):
            problems.append(f"{path}: expected a list of classes after '{split}:', found {quoted(data[split])}")
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
                f"found {quoted(item)}"
            )
        elif reason := unsafe(item["folder"], parts=1):
            problems.append(f"{path}: class {number} of {split}: folder {quoted(item['folder'])} {reason}")
        else:
            entries.append(ClassEntry(item["folder"], item["prompt"], item["videos"]))
    return entries


def _check_disjoint(classes: dict[str, list[ClassEntry]], path: Path, problems: list[str]) -> None:
    """Notes every class that is named a second time, in one split or in two."""
    seen: dict[str, str] = {}
    for split, entries in classes.items():
        for entry in entries:
            name = composed(entry.folder).casefold()  # on some disks upper and lower case are the same folder
            if name in seen:
                where = f"twice in {split}" if seen[name] == split else f"in {seen[name]} and in {split}"
                problems.append(
                    f"{path}: class {quoted(entry.folder)} is {where}; each class belongs to one split, once"
                )
            seen.setdefault(name, split)
