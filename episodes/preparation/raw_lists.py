"""Reads video lists in the layouts that public code ships: the class and the name of each video of a split.

    cartwheel/Turnk_r_cartwheel_f_cm_np1_le_med_0              class/video
    val0//videos/cartwheel/Turnk_r_cartwheel_f_cm_np1.avi      class by number and by folder
    test3/78687                                                class by its position in the class list
    Closing something/78687                                    class by label
    19/78687                                                   class by the data set's label number
    baking cookies/-514AQUrSow_000058_000068                   YouTube id and times
    ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1              a label after the name
    videos/v_ApplyEyeMakeup_g08_c01.avi,ApplyEyeMakeup         the class after the name, with or without quotation marks
    /data/frames/Turnk_r_cartwheel_f_cm_np1_le_med_0 76 31     absolute path, frames, label
    0,Turnk_r_cartwheel_f_cm_np1_le_med_0                      label and name
    # comment        path,label                                skipped: a comment, the names of columns
                                                               tables with such names, and JSON: `list_tables`

A class is found by folder or label first, then by number. A number without a class name needs evidence: the position
in the class list (`test3`), labels.json, or the class folder of the raw video.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from episodes.preparation.list_files import has_list, list_file, list_lines
from episodes.preparation.list_lines import (
    Line,
    cut_first_number,
    name_and_class,
    parsed_line,
    readings,
    why_unsafe,
)
from episodes.preparation.names import class_key, raw_video_name, why_not_storable
from episodes.search import SPLITS
from episodes.splits import ClassEntry, raise_problems

NUMBERED = re.compile(rf"(?:{'|'.join(SPLITS)})\d+")
COLUMN_END = re.compile(r"[,;\t ]")
COLUMNS = frozenset({
    "path", "video", "video_path", "video_id", "video_name", "file", "filename", "file_name", "id", "youtube_id",
    "name", "label", "label_id", "class", "class_id", "class_name", "category", "split", "frames", "num_frames",
})  # fmt: skip
Classes = Mapping[str, Sequence[ClassEntry]]


@dataclass(frozen=True)
class ListedVideo:
    """One line of a list: the class folder as in the class list, the video's name, and the file and line."""

    folder: str
    name: str
    where: str


@dataclass(frozen=True)
class Evidence:
    """Information from outside a list that resolves its lines.

    Attributes:
        class_of: video name -> class folder of its raw video or annotation, or None.
        label_names: number -> label of the data set (labels.json).
        exists: whether (class folder, video name) is a raw video; None if a number after a name is always a label.
    """

    class_of: Callable[[str], str | None] = lambda name: None
    label_names: Mapping[str, str] = field(default_factory=dict)
    exists: Callable[[str, str], bool] | None = None


def read_lists(
    folder: Path, classes: Classes, evidence: Evidence | None = None, optional: Collection[str] = ()
) -> dict[str, list[ListedVideo]]:
    """Reads the train, val and test list of a folder.

    Args:
        folder: contains a file for each split (`list_file`).
        classes: split -> its classes.
        evidence: information from outside the lists.
        optional: splits that may have no list, or an empty one.

    Returns:
        split -> videos, in the order of the list.

    Raises:
        UserError: a list is missing or ambiguous, or some lines are invalid, with a sentence for each: an unsafe
            path, an unknown class, a number that disagrees with the class, or a video that is listed twice.
    """
    problems: list[str] = []
    lists: dict[str, list[ListedVideo]] = {}
    for split in SPLITS:
        lists[split] = []
        if split in optional and not has_list(folder, split):
            continue
        path = list_file(folder, split)
        texts = {number: text for number, text in enumerate(list_lines(path), start=1) if text}
        if split in optional and not texts:
            continue
        lists[split] = _ListReader(path, split, classes, evidence or Evidence(), problems).read(texts)
    raise_problems(problems)
    return lists


class _NotFoundError(Exception):
    """A line does not name a class of its split; the message is the reason."""


class _NoEvidenceError(_NotFoundError):
    """A line has a number instead of a class, and nothing shows which class that is."""


class _ListReader:
    """A reader of one list, which appends a message to `problems` for each invalid line."""

    def __init__(self, path: Path, split: str, classes: Classes, evidence: Evidence, problems: list[str]) -> None:
        self.path, self.split, self.evidence, self.problems = path, split, evidence, problems
        entries = [(name, entry) for name in (*(other for other in SPLITS if other != split), split)
                   for entry in classes.get(name, ())]  # fmt: skip
        self.split_of = {entry.folder: name for name, entry in entries}
        self.by_key = {class_key(entry.prompt): entry.folder for _, entry in entries}
        self.by_key |= {class_key(entry.folder): entry.folder for _, entry in entries}
        self.own = {entry.folder for entry in classes[split]}
        self.position = {f"{split}{number}": entry.folder for number, entry in enumerate(classes[split])}
        self.by_position = False

    def read(self, texts: Mapping[int, str]) -> list[ListedVideo]:
        """Returns the videos of the numbered lines, in their order."""
        lines = {number: self._line(text) for number, text in texts.items()}
        lines = {number: line for number, line in lines.items() if not self._names_no_video(texts[number], line)}
        empty = not lines
        lines = {number: line for number, line in lines.items() if self._usable(number, texts[number], line)}
        first = {line.folders[0] for line in lines.values() if line.folders}
        # `train24` is the folder of a class in one list, and the 25th class in another, which then has `train0` too.
        numbered = not first <= self.own and first <= set(self.position)
        self.by_position = numbered and self.evidence.exists is None  # a user's own classes have no known order
        lines = self._by_existence(texts, lines)
        folders = self._folders(lines)
        self._check_numbers(lines, folders)
        listed: list[ListedVideo] = []
        first_line: dict[tuple[str, str], int] = {}
        for number, folder in folders.items():
            name = raw_video_name(lines[number].video)
            if reason := why_not_storable(name):
                self._problem(number, f"{name!r}: {reason}")
            elif (folder, name) in first_line:
                self._problem(number, f"{name!r} is already in line {first_line[folder, name]}")
            else:
                first_line[folder, name] = number
                listed.append(ListedVideo(folder, name, f"{self.path.name} line {number}"))
        if empty:
            self.problems.append(f"{self.path}: the list is empty")
        return listed

    def _line(self, text: str) -> Line:
        """Parses a line; the fields of `video,class` are swapped to the order class, video."""
        line = self._without_class_behind(parsed_line(text))
        if len(line.folders) == 1 and not self._named(line) and "/" not in text and "\\" not in text:
            swapped = Line((line.video,), line.folders[0], line.label)
            return swapped if self._named(swapped) else line
        return line

    def _without_class_behind(self, line: Line) -> Line:
        """Converts `kick/v1.mp4,kick` to the line `kick/v1.mp4`, which must be of that class."""
        for name, behind in name_and_class(line.video) if line.folders else ():
            if folder := self.by_key.get(class_key(behind)):
                return replace(line, video=name, behind=folder)
        return line

    def _names_no_video(self, text: str, line: Line) -> bool:
        """Returns whether a line is a comment or the names of columns, and is not the name of a class or video."""
        if line.folders and line.folders[0] in self.split_of:
            return False
        if not line.folders and self.evidence.class_of(raw_video_name(line.video)) is not None:
            return False
        columns = [column.strip(" \"'").lower() for column in COLUMN_END.split(text)]
        return text.startswith("#") or (len(columns) > 1 and COLUMNS.issuperset(columns))

    def _usable(self, number: int, text: str, line: Line) -> bool:
        reason = why_unsafe(text, line)
        if reason:
            self._problem(number, f"{text!r} {reason}")
        return not reason

    def _by_existence(self, texts: Mapping[int, str], lines: Mapping[int, Line]) -> dict[int, Line]:
        """Selects the reading of each line whose video exists: `take 1` ends with a number, `v1.mp4 0` with a label.

        Without such a video, it selects the reading that fits most other lines.
        """
        if self.evidence.exists is None:
            return dict(lines)
        alternatives = {number: self._readings_of(texts[number]) for number in lines}
        right = {
            number: choice
            for number, choices in alternatives.items()
            if (choice := next((i for i, line in enumerate(choices) if self._exists(line)), None)) is not None
        }
        usual = Counter(right.values()).most_common(1)[0][0] if right else 0
        return {
            number: choices[right.get(number, min(usual, len(choices) - 1))] for number, choices in alternatives.items()
        }

    def _readings_of(self, text: str) -> list[Line]:
        """Returns the readings of a line; the last one removes a number at its beginning."""
        lines = [self._without_class_behind(line) for line in readings(text)]
        name = cut_first_number(text)[1]
        return [*lines, readings(name)[0]] if len(lines) > 1 and name else lines

    def _exists(self, line: Line) -> bool:
        assert self.evidence.exists is not None
        try:
            return self.evidence.exists(self._folder(line), raw_video_name(line.video))
        except _NotFoundError:
            return False

    def _folders(self, lines: Mapping[int, Line]) -> dict[int, str]:
        """Returns line number -> class folder; a label without other evidence has the class of other lines with it."""
        folder_of_line: dict[int, str] = {}
        errors: dict[int, _NotFoundError] = {}
        for number, line in lines.items():
            try:
                folder_of_line[number] = self._folder(line)
            except _NotFoundError as error:
                errors[number] = error
        learned = {line.label: folder_of_line[number] for number, line in lines.items() if number in folder_of_line}
        unclear = []
        for number, reason in errors.items():
            label = lines[number].label
            if not isinstance(reason, _NoEvidenceError):
                self._problem(number, str(reason))
            elif label in learned:
                folder_of_line[number] = learned[label]
            else:
                unclear.append(number)
        if unclear:  # one message, since all lines have the same cause
            more = f" (and {len(unclear) - 1:,} more lines like it)" if len(unclear) > 1 else ""
            self._problem(unclear[0], f"{errors[unclear[0]]}{more}")
        return dict(sorted(folder_of_line.items()))

    def _folder(self, line: Line) -> str:
        """Returns the class folder of a line; raises _NotFoundError with the reason."""
        written = "/".join(line.folders)
        known = self.evidence.class_of(raw_video_name(line.video))
        if folder := self._named(line):
            if line.behind not in (None, folder):
                raise _NotFoundError(f"{written!r} is {folder!r}, but the class behind the name is {line.behind!r}")
            return self._of_this_split(folder, f"{written!r} is")
        if line.behind is not None:
            return self._of_this_split(line.behind, f"{line.behind!r} is")
        if self.by_position and line.folders:
            folder = self.position[line.folders[0]]
            if known is not None and known != folder:
                raise _NotFoundError(
                    f"{written!r} is {folder!r} by its position in the class list, but the video is one of {known!r}; "
                    "use a list whose classes are numbered as in the class list"
                )
            return folder
        if line.label is None:
            nowhere = "has no folder among the videos, or " if self.evidence.exists else ""
            raise _NotFoundError(f"{written!r} {nowhere}is not one of the {self.split} classes")
        if self.evidence.label_names:
            label = self.evidence.label_names.get(line.label, "")
            folder = self.by_key.get(class_key(label))
            if folder is None:
                raise _NotFoundError(
                    f"number {line.label} is {label or 'unknown'!r} in labels.json, which is not a class here"
                )
            return self._of_this_split(folder, f"number {line.label} is {label!r} in labels.json,")
        if known is not None:
            return self._of_this_split(known, f"{line.video!r} is a video of {known!r},")
        raise _NoEvidenceError(
            f"number {line.label} is not the name of a class, and its class is unknown; put labels.json or the "
            "annotations of the data set beside the lists, keep the raw videos in class folders, or write "
            "class/video lines"
        )

    def _named(self, line: Line) -> str | None:
        """Returns the class of the innermost folder that has the name of a class, of any split."""
        for part in reversed(line.folders):
            if self.by_position and part in self.position:
                continue
            folder = part if part in self.split_of else self.by_key.get(class_key(part))
            if folder is not None:
                return folder
        return None

    def _of_this_split(self, folder: str, what: str) -> str:
        if folder not in self.own:
            raise _NotFoundError(
                f"{what} a class of the {self.split_of.get(folder, 'other')} split, in the {self.split} list"
            )
        return folder

    def _check_numbers(self, lines: Mapping[int, Line], folders: dict[int, str]) -> None:
        """Adds problems for numbers that mean different classes in the list, and classes with different numbers."""
        numbers = {
            number: line.folders[0] for number, line in lines.items() if number in folders and self._numbered(line)
        }
        if not numbers:
            numbers = {number: label for number in folders if (label := lines[number].label) is not None}
            if len(set(numbers.values())) > len(set(folders.values())) + 1:
                return  # numbers of frames rather than of classes
        folder_of: dict[str, tuple[str, int]] = {}
        number_of: dict[str, tuple[str, int]] = {}
        for number, written in numbers.items():
            folder = folders[number]
            other, where = folder_of.setdefault(written, (folder, number))
            same, there = number_of.setdefault(folder, (written, number))
            if other != folder:
                self._problem(number, f"number {written} is {folder!r} here but {other!r} in line {where}")
            elif same != written:
                self._problem(number, f"{folder!r} has number {written} here but {same} in line {there}")

    def _numbered(self, line: Line) -> bool:
        return bool(line.folders and NUMBERED.fullmatch(line.folders[0]) and line.folders[0] not in self.own)

    def _problem(self, number: int, what: str) -> None:
        self.problems.append(f"{self.path} line {number}: {what}")
