"""Video lists in the layouts that circulate -> which videos of which class belong to a split.

    cartwheel/Turnk_r_cartwheel_f_cm_np1_le_med_0              class/video
    val0//videos/cartwheel/Turnk_r_cartwheel_f_cm_np1.avi      class by number and by folder
    test3/78687                                                class by number
    Closing something/78687                                    class by label
    baking cookies/-514AQUrSow_000058_000068                   YouTube id and times
    ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1              a label after the name

Which class a line means is settled by the class list: by folder or label first, then by number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from episodes.class_lists import ClassEntry, raise_problems
from episodes.preparation.names import class_key, raw_video_name, why_not_storable
from episodes.search import SPLITS
from utils.errors import UserError

LABEL_AT_END = re.compile(r"\s+\d+$")


@dataclass(frozen=True)
class ListedVideo:
    """One line of a list: the class's folder in our class list, the video's name, and where it stands."""

    folder: str
    name: str
    where: str


def read_lists(
    folder: Path, classes: Mapping[str, Sequence[ClassEntry]], labels: bool = True
) -> dict[str, list[ListedVideo]]:
    """Read the train, val and test list of a folder.

    Args:
        folder: holds a file for each split, its name beginning with the split's.
        classes: split -> its classes.
        labels: a number at the end of a line, after a space, is a label; else it belongs to the video's name.

    Returns:
        split -> videos, in the order of the list.

    Raises:
        UserError: a list is missing or there are several, a line is unsafe or names no class of its split, a video
            is named twice, a sentence each.
    """
    problems: list[str] = []
    lists = {}
    for split in SPLITS:
        path = list_file(folder, split)
        lines = [(number, line) for number, line in enumerate(list_lines(path), start=1) if line]
        if labels:
            lines = [(number, LABEL_AT_END.sub("", line)) for number, line in lines]
        lists[split] = _read_list(path, lines, split, classes[split], problems)
    raise_problems(problems)
    return lists


def list_file(folder: Path, split: str) -> Path:
    """The list of a split: trainlist03.txt, trainlist07.txt, train_few_shot.txt, train.list, ...

    Raises:
        UserError: there is no such folder, no such list, or more than one.
    """
    if not folder.is_dir():
        raise UserError(f"--lists {folder} is no folder; name the folder that holds the train, val and test list")
    names = [path for path in sorted(folder.iterdir()) if path.name.lower().startswith(split)]
    files = [path for path in names if path.is_file() and path.suffix.lower() in (".txt", ".list")]
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise UserError(
            f"--lists {folder}: expected one {split} list, such as {split}list03.txt or {split}_few_shot.txt, "
            f"found {found}; keep the lists of one split of the benchmark in a folder of their own"
        )
    return files[0]


def _read_list(
    path: Path, lines: Sequence[tuple[int, str]], split: str, entries: Sequence[ClassEntry], problems: list[str]
) -> list[ListedVideo]:
    """The videos of the numbered lines of one list; what is wrong with them joins `problems`."""
    parts_of: dict[int, list[str]] = {}
    for number, line in lines:
        parts = [part for part in line.split("/") if part]  # `train0//videos/...` has an empty one
        if reason := _why_unsafe(line, parts):
            problems.append(f"{path} line {number}: {line!r} {reason}")
        else:
            parts_of[number] = parts
    finder = _ClassFinder(split, entries, [parts[:-1] for parts in parts_of.values()])
    listed: list[ListedVideo] = []
    first_line: dict[tuple[str, str], int] = {}
    for number, parts in parts_of.items():
        where, name = f"{path.name} line {number}", raw_video_name(parts[-1])
        folder = finder.find(parts[:-1])
        if folder is None:
            problems.append(f"{path} line {number}: {'/'.join(parts[:-1])!r} is none of the {split} classes")
        elif why_not_storable(name):
            problems.append(f"{path} line {number}: {name!r}: {why_not_storable(name)}")
        elif (folder, name) in first_line:
            problems.append(f"{path} line {number}: {name!r} was named before, in line {first_line[folder, name]}")
        else:
            first_line[folder, name] = number
            listed.append(ListedVideo(folder, name, where))
    if not listed and not problems:
        problems.append(f"{path}: the list is empty")
    return listed


def list_lines(path: Path) -> list[str]:
    """The lines of a list without what surrounds them: a byte order mark, spaces, Windows line ends.

    Raises:
        UserError: the file cannot be read as text.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _why_unsafe(line: str, parts: list[str]) -> str:
    """Why a line cannot be taken, or ""."""
    if any(character < " " or character in "\\\x7f" for character in line):
        return "holds a control character or a backslash"
    if line.startswith("/") or ".." in parts or "." in parts:
        return "leaves the folder of the videos"
    return "" if len(parts) >= 2 else "is not of the form class/video"


class _ClassFinder:
    """Which class of a split the first parts of a line mean."""

    def __init__(self, split: str, entries: Sequence[ClassEntry], all_parts: Sequence[list[str]]) -> None:
        """`all_parts` are those of all lines: only together do they tell how the classes are numbered."""
        self.exact = {entry.folder: entry.folder for entry in entries}
        self.by_key = {class_key(entry.prompt): entry.folder for entry in entries}
        self.by_key |= {class_key(entry.folder): entry.folder for entry in entries}
        by_number = {f"{split}{number}": entry.folder for number, entry in enumerate(entries)}
        first = {parts[0] for parts in all_parts if parts}
        # `train24` is the folder of a class in one list, and the 25th class in another, which then has `train0` too.
        if not first <= set(self.exact) and first <= set(by_number):
            self.exact |= by_number

    def find(self, parts: Sequence[str]) -> str | None:
        """The folder of the class, None if there is none of that name."""
        for part in reversed(parts):
            folder = self.exact.get(part) or self.by_key.get(class_key(part))
            if folder is not None:
                return folder
        return None
