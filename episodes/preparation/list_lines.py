"""Parses a line of a video list: the folders before the video, the video's name, and the number of its class."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from episodes.search import cut_number
from episodes.video_files import VIDEO_SUFFIXES

MAX_NUMBERS = 3  # `name 0`, `name 405 0` (frames and label), `name 2 405 0` (first frame, frames, label)
BLANK = " ,\t"
QUOTED = re.compile(r"""^(["'])([^"']*)\1""")
BEHIND_NAME = re.compile(r" *[,;\t] *| +")


@dataclass(frozen=True)
class Line:
    """A line of a list.

    Attributes:
        folders: from the outermost inwards.
        video: its name as written.
        label: the number of its class.
        behind: the class that is written after the name.
    """

    folders: tuple[str, ...]
    video: str
    label: str | None = None
    behind: str | None = None

    @property
    def names_video(self) -> bool:
        """Whether the line has more than one word: a class, or its number, beside the video."""
        return bool(self.folders) or self.label is not None


def parsed_line(text: str) -> Line:
    """Parses a line; Windows paths count as paths, and numbers in columns do not belong to the name.

    Args:
        text: the line, without surrounding spaces.
    """
    return readings(text)[-1]


def readings(text: str) -> list[Line]:
    """Returns the ways to read a line: without columns of numbers, then with one more of them at its end (or start)."""
    body = text.replace("\\", "/")
    lines, rest, label = [_line(body, None)], body, ""
    while len(lines) <= MAX_NUMBERS and (cut := cut_number(rest))[0]:
        rest, label = cut[0], label or cut[1]
        lines.append(_line(rest, _plain(label)))
    number, name = cut_first_number(body)
    if len(lines) == 1 and name:
        lines.append(_line(name, _plain(number)))
    return lines


def unquoted(text: str) -> str:
    """Returns a line without quotation marks around the name."""
    return QUOTED.sub(r"\2", text)


def name_and_class(video: str) -> Iterator[tuple[str, str]]:
    """Yields the ways to read `v1.mp4,kick` or `v1.mp4 kick` as name and class; a space must follow a suffix."""
    for match in BEHIND_NAME.finditer(video):
        name, behind = video[: match.start()], video[match.end() :]
        if name and behind and (match[0].strip(" ") or os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES):
            yield name, behind


def _plain(number: str) -> str:
    """Returns a number without leading zeros, as text, since Python limits the digits of an int."""
    return number.lstrip("0") or "0"


def cut_first_number(text: str) -> tuple[str, str]:
    """Splits off a number in the first column: `0,v1.mp4` -> `0` and `v1.mp4`; without one, both are ""."""
    rest = text.lstrip("0123456789")
    name = rest.lstrip(BLANK)
    return (text[: len(text) - len(rest)], name) if name and len(name) < len(rest) < len(text) else ("", "")


def _line(body: str, label: str | None) -> Line:
    """Parses a line without its columns of numbers."""
    fields = [field.strip() for field in body.replace("\t", ",").split(",")]
    if "/" not in body and len(fields) == 2 and all(fields):
        return Line((fields[0],), fields[1], label)
    parts = [part for part in body.split("/") if part not in ("", ".")]  # `train0//videos/...` has an empty one
    *folders, video = parts or [""]
    if label is None and folders and folders[-1].isdecimal():
        label = _plain(folders[-1])
    return Line(tuple(folders), video, label)


def why_unsafe(text: str, line: Line) -> str:
    """Returns the reason why a line cannot be used, or ""."""
    if any((character < " " and character != "\t") or character == "\x7f" for character in text):
        return "contains a control character"
    if ".." in (*line.folders, line.video):
        return "points outside the folder of the videos"
    return "" if line.names_video and line.video else "is not of the form class/video"
