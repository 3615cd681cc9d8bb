"""Finding raw videos: below class folders, or anywhere by the id that names the file.

A raw video is a video file or a folder of images. Links are followed. Nothing is ever changed here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from episodes.images import IMAGE_SUFFIXES
from episodes.preparation.names import class_key, raw_video_name
from episodes.video import VIDEO_SUFFIXES
from utils.errors import UserError

ARCHIVE_SUFFIXES = frozenset({".rar", ".zip", ".tar", ".gz", ".tgz", ".7z"})
# 11 characters of YouTube's, and where the clip was cut out, in seconds.
KINETICS_NAME = re.compile(r"(.{11})(?:_(\d{6}_\d{6}))?", re.ASCII)


@dataclass(frozen=True)
class RawVideo:
    """A raw video: its name without suffix, the folders above it (from the root down), its path."""

    name: str
    above: tuple[str, ...]
    path: Path


def raw_videos(root: Path, leave_out: Collection[Path] = ()) -> Iterator[RawVideo]:
    """Yield every video file and image folder below a folder, sorted by path.

    Args:
        root: where to look.
        leave_out: folders that are not looked into.

    Raises:
        UserError: there is no such folder, or a folder cannot be listed.
    """
    if not root.is_dir():
        raise UserError(f"--videos {root} is no folder; name the folder that holds the raw videos")
    skipped = {os.path.realpath(folder) for folder in leave_out}
    yield from _below(str(root), (), skipped, {os.path.realpath(root)})


def _below(folder: str, above: tuple[str, ...], skipped: set[str], seen: set[str]) -> Iterator[RawVideo]:
    """Videos in one folder and below; `seen` are the real paths of it and the folders above, as links may circle."""
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}; check its permissions") from error
    folders = []
    has_image = has_video = False
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            folders.append(entry)
            continue
        suffix = os.path.splitext(entry.name)[1].lower()
        has_image = has_image or suffix in IMAGE_SUFFIXES
        if suffix in VIDEO_SUFFIXES:
            has_video = True
            yield RawVideo(raw_video_name(entry.name), above, Path(entry.path))
    if has_image and not has_video and above:
        yield RawVideo(raw_video_name(above[-1]), above[:-1], Path(folder))
    for entry in folders:
        real = os.path.realpath(entry.path)
        if real not in skipped and real not in seen:
            yield from _below(entry.path, (*above, entry.name), skipped, seen | {real})


def by_class(videos: Iterable[RawVideo], folders: Collection[str], root: Path) -> dict[str, dict[str, Path]]:
    """Class folder -> video name -> path, for the videos below a folder that has the name of a class.

    Upper and lower case, spaces, underscores and hyphens make no difference between names of folders. Of two
    videos of a name in one class, the first by path is taken.

    Raises:
        UserError: there is no video of any of the classes.
    """
    folder_of_key = {class_key(folder): folder for folder in folders}
    found: dict[str, dict[str, Path]] = {folder: {} for folder in folders}
    for video in videos:
        keys = [class_key(name) for name in video.above]
        folder = next((folder_of_key[key] for key in keys if key in folder_of_key), None)
        if folder is not None:
            found[folder].setdefault(video.name, video.path)
    if not any(found.values()):
        raise _nothing_found(root, f"class folders such as {', '.join(list(folders)[:3])}, with videos in them")
    return found


def by_number(videos: Iterable[RawVideo], root: Path) -> dict[str, list[Path]]:
    """Id -> paths, for the videos whose name is a number. Raises UserError when there is none."""
    found: dict[str, list[Path]] = {}
    for video in videos:
        if video.name.isdecimal():
            found.setdefault(video.name, []).append(video.path)
    if not found:
        raise _nothing_found(root, "videos named by number, such as 78687.webm")
    return found


def by_youtube_id(videos: Iterable[RawVideo], root: Path) -> dict[str, list[Path]]:
    """Id -> paths, for the videos named by a YouTube id, with or without times. Raises UserError for none."""
    found: dict[str, list[Path]] = {}
    for video in videos:
        if match := KINETICS_NAME.fullmatch(video.name):
            found.setdefault(match[1], []).append(video.path)
    if not found:
        raise _nothing_found(root, "videos named by YouTube id, such as -514AQUrSow_000058_000068.mp4")
    return found


def _nothing_found(root: Path, expected: str) -> UserError:
    """The error for a folder without a video of the benchmark; it tells of archives, the likely reason."""
    archives = [name for name in sorted(os.listdir(root)) if os.path.splitext(name)[1].lower() in ARCHIVE_SUFFIXES]
    hint = f"it holds archives ({archives[0]}, ...): unpack them" if archives else "name the folder that holds them"
    return UserError(f"no raw video of this data set below {root}: expected {expected}; {hint}")
