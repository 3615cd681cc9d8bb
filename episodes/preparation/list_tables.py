"""Converts lists that are tables to lines of the form class/video, which `list_lines` parses.

path,label                                                  CSV with named columns; further columns do not matter
label,youtube_id,time_start,time_end,split                  of Kinetics, whose times are part of a video's name
[{"id": "78687", "template": "Closing [something]"}, ...]   JSON with the same names; also an object on each line
{"clap": ["a.avi", ...], ...}                               the videos of each class
{"label_names": [...], "image_names": [...], "image_labels": [...]}    of few-shot image classification
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from episodes.preparation.list_lines import unquoted
from episodes.preparation.names import class_key

VIDEO_COLUMNS = (
    "path", "video_path", "filepath", "file_path", "file", "filename", "file_name", "video", "video_id", "video_name",
    "youtube_id", "id", "name",
)  # fmt: skip
CLASS_COLUMNS = ("template", "class_name", "label_name", "class", "category", "label", "class_id", "label_id")
TIMES = ("time_start", "time_end")
START_OF_JSON = re.compile(r'\s*(\{|\[\s*["{\[\]])')  # other than `[Something] colliding with [something]/42326`
Row = Mapping[str, Any]


def table_lines(text: str) -> list[str]:
    """Returns the lines of a list, those of a table as class/video; the names of its columns become an empty line.

    Raises:
        ValueError: JSON of an unknown form, or a row without a video or a class, or with one in another class's folder.
    """
    lines = [line.strip() for line in text.split("\n")]
    is_json = START_OF_JSON.match(text) is not None
    rows = _json_rows(text) if is_json else _csv_rows(lines)
    pairs = [_video_and_class(row, number) if row else None for number, row in enumerate(rows, start=1)]
    keys = {class_key(pair[1]) for pair in pairs if pair}
    return [_line(*pair, keys) if pair else "" for pair in pairs] or [unquoted(line) for line in lines]


def _json_rows(text: str) -> list[Row]:
    try:
        content = json.loads(text)
    except ValueError:  # an object on each line, or damaged
        content = [json.loads(line) for line in text.splitlines() if line.strip()]
    match content:
        case {"label_names": [*labels], "image_names": [*names], "image_labels": [*numbers]}:
            names_of = dict(enumerate(labels))
            return [{"path": name, "label": names_of.get(i)} for name, i in zip(names, numbers, strict=True)]
        case dict() if content and all(isinstance(videos, list) for videos in content.values()):
            return [{"path": video, "class": name} for name, videos in content.items() for video in videos]
        case [dict(), *rest] if all(isinstance(row, dict) for row in rest):
            return content
    raise ValueError(
        'JSON other than {"class": ["video", ...], ...} or a list of objects with a video and a class each'
    )


def _csv_rows(lines: Sequence[str]) -> list[Row]:
    """Returns the rows below the names of columns, one per line; an empty list if it is not such a table."""
    start = next((number for number, line in enumerate(lines) if line), len(lines))
    delimiter = next((mark for mark in "\t;" if start < len(lines) and mark in lines[start]), ",")
    header, *table = csv.reader(lines[start:], delimiter=delimiter) if start < len(lines) else [[]]
    names = [name.strip().lower() for name in header]
    is_table = not {*VIDEO_COLUMNS}.isdisjoint(names) and not {*CLASS_COLUMNS}.isdisjoint(names)
    if not is_table or any(row and len(row) != len(names) for row in table) or len(table) != len(lines) - start - 1:
        return []
    return [{}] * (start + 1) + [dict(zip(names, row, strict=True)) if row else {} for row in table]


def _video_and_class(row: Row, number: int) -> tuple[str, str]:
    """Returns the video and the class of a row; of several class columns, the first one that is not a number."""
    row = {name.lower(): str(value).strip() for name, value in row.items() if isinstance(value, str | int | float)}
    video = next((row[name] for name in VIDEO_COLUMNS if row.get(name)), "").replace("\\", "/")
    classes = [row[name] for name in CLASS_COLUMNS if row.get(name)]
    if not video or not classes:
        raise ValueError(f"entry {number} has no video ({', '.join(VIDEO_COLUMNS)}) or no class ("
                         f"{', '.join(CLASS_COLUMNS)})")  # fmt: skip
    times = [row.get(name, "") for name in TIMES]
    if "youtube_id" in row and all(time.replace(".", "", 1).isdecimal() for time in times):
        video += "".join(f"_{int(float(time)):06d}" for time in times)
    return video, next((name for name in classes if not name.isdecimal()), classes[0])


def _line(video: str, name: str, keys: set[str]) -> str:
    """Returns a row as a line; raises ValueError for a video in the folder of another class."""
    if name.isdecimal():
        return f"{video},{name}"
    *folders, file = video.split("/")
    for folder in folders:
        if class_key(folder) in keys - {class_key(name)}:
            raise ValueError(f"{video} is in the folder of a class other than {name!r}")
    return f"{name.replace('/', ' ')}/{file}"
