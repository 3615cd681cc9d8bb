"""Finds raw videos: below class folders, or anywhere by the id in the file name.

A raw video is a video file or a folder of images. Links are followed. Raw videos are never changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from episodes.frame_names import Kind, folder_group
from episodes.images import IMAGE_SUFFIXES
from episodes.preparation.names import class_key, raw_video_name
from episodes.search import LOOKS_LIKE_VIDEO, is_system_folder
from episodes.side_by_side import OTHER_FORM, contains_videos, other_forms, side_by_side
from episodes.video_files import ANIMATION_SUFFIXES, CONTAINER_SUFFIXES, is_video_file, looks_like_video
from utils.errors import UserError

ARCHIVE_SUFFIXES = frozenset({".rar", ".zip", ".tar", ".gz", ".tgz", ".7z", ".bz2", ".xz", ".zst"})
# Something-Something V2 comes in parts (20bn-something-something-v2-00, ...); others end in .001, .z01 or .tar.gz.aa.
ARCHIVE_PART = re.compile(
    r"something-v2-?\d\d(\.zip)?$|\.(\d{3}|z\d\d|part\d+)$|\.(zip|tar|tgz|gz|7z)[-.]?([a-z]{2}|\d\d)$"
)
UNFINISHED_SUFFIXES = (".part", ".crdownload", ".download", ".aria2", ".ytdl", ".partial", ".!ut", ".!qb", ".tmp")
UNREAD_IMAGE_SUFFIXES = frozenset({
    ".heic", ".heif", ".jxl", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2",
})  # fmt: skip
DIGITS = re.compile(r"\d+")
MIN_FRAMES = 3  # in a folder with folders of videos, fewer images are pictures of the class or similar
# A YouTube id of 11 characters, and the start and end of the clip in seconds.
KINETICS_NAME = re.compile(r"(.{11})(?:_(\d{6}_\d{6}))?", re.ASCII)

FoundVideos = dict[str, dict[str, list[Path]]]  # class folder -> video name -> files, sorted by path


@dataclass(frozen=True)
class RawVideo:
    """A raw video: its name without suffix, the folders above it (from the root down), and its path."""

    name: str
    above: tuple[str, ...]
    path: Path


@dataclass(frozen=True)
class LeftOut:
    """A file that is not read: the folders above it (from the root down), its path, and the reason.

    Attributes:
        may_be_video: whether it may nevertheless be a video.
    """

    above: tuple[str, ...]
    path: Path
    reason: str
    may_be_video: bool

    @property
    def name(self) -> str:
        """Its path below the root."""
        return "/".join((*self.above, self.path.name))


def raw_videos(
    root: Path,
    leave_out: Collection[Path] = (),
    left_out: list[LeftOut] | None = None,
    notes: list[str] | None = None,
) -> Iterator[RawVideo]:
    """Yields every video file and image folder below a folder, sorted by path.

    Of alternative folders with the same videos in several forms (`rgb` and `flow`, `videos` and `rawframes`), one is
    used, and it is not one of the folders above a video.

    Args:
        root: folder to search.
        leave_out: folders that are not searched.
        left_out: a list to which the files that are not read are added.
        notes: a list to which a sentence on each choice among folders is added.

    Raises:
        UserError: there is no such folder, a folder cannot be listed, or one of several folders must be chosen.
    """
    if not root.is_dir():
        raise UserError(f"--videos {root} is not a folder; use the folder with the raw videos")
    skipped = {os.path.realpath(folder) for folder in leave_out}
    search = _Search(skipped, [] if left_out is None else left_out, [] if notes is None else notes)
    yield from search.below(root, (), {os.path.realpath(root)})


def is_raw_video(folder: Path) -> bool:
    """Returns whether the images in a folder, or in `rgb` beside `flow` in it, are one raw video.

    Raises:
        UserError: the folder cannot be listed, or one of several folders must be chosen.
    """
    found = _Search(set(), [], []).below(folder, (folder.name,), {os.path.realpath(folder)})
    return next((video.path == folder for video in found), False)


@dataclass(frozen=True)
class _Search:
    """A search: the real paths that it skips, and its reports."""

    skipped: set[str]
    left_out: list[LeftOut]
    notes: list[str]

    def below(self, folder: Path, above: tuple[str, ...], seen: set[str]) -> Iterator[RawVideo]:
        """Yields videos in a folder and below; `seen` has the real paths of it and its parents, against link cycles."""
        folders, files = self._entries(folder, above, seen)
        images: list[Path] = []
        videos = {raw_video_name(path.name) for path in files if path.suffix.lower() in CONTAINER_SUFFIXES | {".gif"}}
        forms = other_forms(folder, list(folders), videos)
        has_video = False
        still: set[str] = set()  # names of images without their numbers, whose first one is not an animation
        for path in files:
            suffix = path.suffix.lower()
            # Only the first of numbered PNG files is opened to find animations: opening all takes long.
            unnumbered = DIGITS.sub("", path.name)
            is_frame = suffix == ".png" and unnumbered in still
            if not is_frame and is_video_file(str(path)):
                has_video = True
                if (name := raw_video_name(path.name)) in forms:
                    self.left_out.append(LeftOut(above, path, OTHER_FORM, may_be_video=True))
                else:
                    yield RawVideo(name, above, path)
            elif suffix in IMAGE_SUFFIXES | ANIMATION_SUFFIXES:
                images.append(path)
                still.add(unnumbered)
            else:
                self.left_out.append(_left_out(above, str(path)))
        if above and not (folders or images or has_video):
            self.left_out.extend(_without_frames(above, folder, files))
        # Few images beside folders of videos are pictures of the class or similar.
        few = len(images) < MIN_FRAMES and any(contains_videos(folder / name) for name in folders)
        is_video = bool(images and above) and not has_video and not few
        choice = None if is_video or has_video else side_by_side(folder, list(folders))
        if choice is not None and choice.is_video and above:
            is_video = True
        if is_video:
            yield RawVideo(raw_video_name(above[-1]), above[:-1], folder)
            folders = {name: real for name, real in folders.items() if folder_group(name).kind is Kind.UNKNOWN}
        else:
            self.left_out.extend(LeftOut(above, path, "an image among videos", may_be_video=False) for path in images)
            for name in sorted(forms.intersection(folders)) if above and choice is None else ():
                self.left_out.append(LeftOut(above, folder / name, OTHER_FORM, may_be_video=False))
                del folders[name]
        if choice is not None and not is_video:
            if choice.note:
                self.notes.append(f"{'/'.join(above) or '--videos'}: {choice.note}")
            yield from self.below(folder / choice.used, above, seen | {folders[choice.used]})
            return
        for name, real in folders.items():
            yield from self.below(folder / name, (*above, name), seen | {real})

    def _entries(self, folder: Path, above: tuple[str, ...], seen: set[str]) -> tuple[dict[str, str], list[Path]]:
        """Returns the folders to search, name -> real path, and the files in a folder."""
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{folder}: cannot be listed: {error.strerror}; check its permissions") from error
        folders: dict[str, str] = {}
        files = []
        for entry in entries:
            if is_system_folder(entry.name):
                continue
            if entry.name.startswith("."):
                # macOS writes a companion file that begins with ._ next to each file on other file systems.
                if not entry.name.startswith("._") and looks_like_video(entry.path):
                    self.left_out.append(LeftOut(above, Path(entry.path), "it is hidden; rename it", may_be_video=True))
            elif entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in self.skipped and real not in seen:
                    folders[entry.name] = real
            else:
                files.append(Path(entry.path))
        return folders, files


def _without_frames(above: tuple[str, ...], folder: Path, files: Sequence[Path]) -> list[LeftOut]:
    """Returns an entry for a folder that is empty or whose images have an unsupported format."""
    if not files:
        return [LeftOut(above[:-1], folder, "an empty folder", may_be_video=False)]
    unread = [path.suffix.lower() for path in files if path.suffix.lower() in UNREAD_IMAGE_SUFFIXES]
    if not unread:
        return []
    reason = f"its {len(unread)} images ({unread[0]}) are in an unsupported format; convert them to JPEG or PNG"
    return [LeftOut(above[:-1], folder, reason, may_be_video=True)]


def _left_out(above: tuple[str, ...], path: str) -> LeftOut:
    """Returns the entry for a file that is neither a video nor an image."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in UNFINISHED_SUFFIXES:
        return LeftOut(above, Path(path), "its download did not finish; download it again", may_be_video=True)
    if suffix in ARCHIVE_SUFFIXES or ARCHIVE_PART.search(path):
        return LeftOut(above, Path(path), "an archive; unpack it", may_be_video=True)
    if looks_like_video(path):
        return LeftOut(above, Path(path), LOOKS_LIKE_VIDEO, may_be_video=True)
    return LeftOut(above, Path(path), "not a video", may_be_video=False)


def by_class(videos: Iterable[RawVideo], folders: Collection[str], root: Path) -> FoundVideos:
    """Returns class folder -> video name -> paths, for the videos below a folder that has the name of a class.

    Names of folders are compared without case, spaces, underscores and hyphens.

    Raises:
        UserError: there is no video of any of the classes.
    """
    folder_of_key = {class_key(folder): folder for folder in folders}
    paths_of_class: FoundVideos = {folder: {} for folder in folders}
    for video in videos:
        folder = _class_above(video, folder_of_key)
        if folder is not None:
            paths_of_class[folder].setdefault(video.name, []).append(video.path)
    if not any(paths_of_class.values()):
        if class_key(root.absolute().name) in folder_of_key:
            raise UserError(
                f"--videos {root} is the folder of one class; use the folder above, {root.absolute().parent}"
            )
        raise no_videos_error(root, f"class folders such as {', '.join(list(folders)[:3])}, with videos in them")
    return paths_of_class


def _class_above(video: RawVideo, folder_of_key: Mapping[str, str]) -> str | None:
    """Returns the first folder above a video, from the root down, that has the name of a class; None without one."""
    keys = (class_key(name) for name in video.above)
    return next((folder_of_key[key] for key in keys if key in folder_of_key), None)


def folder_of_path(videos: Iterable[RawVideo], folders: Collection[str]) -> dict[Path, str]:
    """Returns path -> class folder, for the raw videos that are in one."""
    folder_of_key = {class_key(folder): folder for folder in folders}
    above = {video.path: _class_above(video, folder_of_key) for video in videos}
    return {path: folder for path, folder in above.items() if folder is not None}


def class_of_folder(
    videos: Iterable[RawVideo], folders: Collection[str], identity: Callable[[str], str]
) -> Callable[[str], str | None]:
    """Returns a function: name of a video -> its class folder; None if it is in none or in several.

    Args:
        videos: raw videos.
        folders: class folders.
        identity: the part of a name that identifies a video.
    """
    folder_of_key = {class_key(folder): folder for folder in folders}
    folder_of_video: dict[str, str | None] = {}
    for video in videos:
        folder = _class_above(video, folder_of_key)
        if folder is not None:
            name = identity(video.name)
            folder_of_video[name] = folder if folder_of_video.get(name, folder) == folder else None
    return lambda name: folder_of_video.get(identity(name))


def video_exists(found: FoundVideos) -> Callable[[str, str], bool]:
    """Returns a function: class folder and video name -> whether there is such a raw video."""
    return lambda folder, name: name in found.get(folder, {})


def by_number(videos: Iterable[RawVideo], root: Path) -> dict[str, list[Path]]:
    """Returns id -> paths of the videos whose name is a number; raises UserError if there are none."""
    paths: dict[str, list[Path]] = {}
    for video in videos:
        if video.name.isdecimal():
            paths.setdefault(video.name, []).append(video.path)
    if not paths:
        raise no_videos_error(root, "videos named by number, such as 78687.webm")
    return paths


def by_youtube_id(videos: Iterable[RawVideo], root: Path) -> dict[str, list[Path]]:
    """Returns id -> paths of the videos named by a YouTube id, with or without times; raises UserError for none."""
    paths: dict[str, list[Path]] = {}
    for video in videos:
        if match := KINETICS_NAME.fullmatch(video.name):
            paths.setdefault(match[1], []).append(video.path)
    if not paths:
        raise no_videos_error(root, "videos named by YouTube id, such as -514AQUrSow_000058_000068.mp4")
    return paths


def no_videos_error(root: Path, expected: str) -> UserError:
    """Returns the error for a folder without a video of the data set, with the likely cause."""
    return UserError(f"no raw video of this data set below {root}: expected {expected}; {_likely_cause(root)}")


def _likely_cause(root: Path) -> str:
    """Returns the cause: unfinished, split or archived downloads, here or one folder down, or the wrong folder."""
    names = [path.relative_to(root).as_posix() for pattern in ("*", "*/*") for path in sorted(root.glob(pattern))]
    if unfinished := [name for name in names if name.lower().endswith(UNFINISHED_SUFFIXES)]:
        return f"{_example(unfinished)} did not finish downloading: download it again"
    if parts := [name for name in names if ARCHIVE_PART.search(name)]:
        return f"it contains parts of one archive ({_example(parts)}): join them in order (cat) and unpack the result"
    if archives := [name for name in names if os.path.splitext(name)[1].lower() in ARCHIVE_SUFFIXES]:
        return f"it contains archives ({_example(archives)}): unpack them"
    return "use the folder that contains them"


def _example(names: Sequence[str]) -> str:
    return names[0] + (", ..." if len(names) > 1 else "")
