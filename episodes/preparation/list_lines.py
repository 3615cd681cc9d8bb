"""One line of a video list -> the folders before the video, the video's name, and the number of its class."""

from __future__ import annotations

import re
from dataclasses import dataclass

NUMBER_LAST = re.compile(r"(\S.*?)(?:\s*[,\t]\s*|\s+)(\d+)")
NUMBER_FIRST = re.compile(r"(\d+)(?:\s*[,\t]\s*|\s+)(\S.*)")
MOST_NUMBERS = 3  # `name 0`, `name 405 0` (frames and label), `name 2 405 0` (first frame, frames, label)
TWO_FIELDS = re.compile(r"([^,\t]+?)\s*[,\t]\s*([^,\t]+)")


@dataclass(frozen=True)
class Line:
    """A line of a list: folders from the outermost inwards, the video as it is written, the number of its class."""

    folders: tuple[str, ...]
    video: str
    label: int | None = None

    @property
    def names_video(self) -> bool:
        """Whether the line has more than one word: a class, or its number, beside the video."""
        return bool(self.folders) or self.label is not None


def take_apart(text: str) -> Line:
    """Takes a line apart; Windows paths count as paths, and numbers in columns are no part of the name.

    Args:
        text: the line, without surrounding spaces.
    """
    lines = readings(text)
    return lines[-1]


def readings(text: str) -> list[Line]:
    """Returns the ways to read a line: without numbers in columns, then with one more of them at its end (or start)."""
    body = text.replace("\\", "/")
    lines, rest, label = [_line(body, None)], body, None
    while len(lines) <= MOST_NUMBERS and (match := NUMBER_LAST.fullmatch(rest)):
        rest, label = match[1], int(match[2]) if label is None else label
        lines.append(_line(rest, label))
    if len(lines) == 1 and (match := NUMBER_FIRST.fullmatch(body)):
        lines.append(_line(match[2], int(match[1])))
    return lines


def _line(body: str, label: int | None) -> Line:
    """A line without the numbers in columns."""
    if "/" not in body and (fields := TWO_FIELDS.fullmatch(body)):
        return Line((fields[1],), fields[2], label)
    parts = [part for part in body.split("/") if part not in ("", ".")]  # `train0//videos/...` has an empty one
    *folders, video = parts or [""]
    if label is None and folders and folders[-1].isdecimal():
        label = int(folders[-1])
    return Line(tuple(folders), video, label)


def why_unsafe(text: str, line: Line) -> str:
    """Returns the reason why a line cannot be used, or ""."""
    if any((character < " " and character != "\t") or character == "\x7f" for character in text):
        return "holds a control character"
    if ".." in (*line.folders, line.video):
        return "leaves the folder of the videos"
    return "" if line.names_video and line.video else "is not of the form class/video"
