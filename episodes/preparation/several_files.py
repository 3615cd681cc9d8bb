"""Videos with several raw files: the first one that can be decoded is used, and the report names it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from episodes.preparation.extract import Record, Task, source_size
from episodes.preparation.plan import WantedVideo
from utils.errors import UserError


class OtherFiles:
    """The files of the videos of a plan that were not tried yet."""

    def __init__(self, videos: Sequence[WantedVideo]) -> None:
        self._left: dict[str, Iterator[Path]] = {
            video.full_name: iter(video.others) for video in videos if video.others
        }

    def next(self, task: Task) -> list[Task]:
        """Returns the task with the next file of the same video in a list, empty if none is left."""
        path = next(self._left.get(task.name, iter(())), None)
        return [] if path is None else [replace(task, source=path)]


def used_file(video: WantedVideo, record: Record) -> Path | None:
    """Returns the first file of a video with the size recorded for the source of its frames; None without one."""
    files = (video.source, *video.others) if video.source else ()
    return next((path for path in files if _size_or_none(path) == record.source_bytes), None)


def choices(videos: Sequence[WantedVideo], records: Mapping[str, Record]) -> list[dict[str, str]]:
    """Returns which file was used for each prepared video that has several; paths are below their common folder."""
    entries = []
    for video in videos:
        if video.source and video.others and video.full_name in records:
            files = [video.source, *video.others]
            top = os.path.commonpath([path.parent for path in files])
            used = used_file(video, records[video.full_name])
            names = [Path(os.path.relpath(path, top)).as_posix() for path in files if path != used]
            chosen = "?" if used is None else Path(os.path.relpath(used, top)).as_posix()
            entries.append({"video": video.full_name, "reason": f"{chosen} is used; not used: {', '.join(names)}"})
    return entries


def _size_or_none(source: Path) -> int | None:
    try:
        return source_size(source)
    except UserError:
        return None
