"""Chooses among folders that contain the same videos in several forms: `rgb` and `flow`, `videos` and `rawframes`."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from episodes.frame_names import FRAME_FOLDERS, Kind, colour_folders, folder_group, is_other_form, other_forms_by_name
from episodes.images import contains_images, is_image_name
from episodes.video_files import CONTAINER_SUFFIXES
from utils.errors import UserError


@dataclass(frozen=True)
class SideBySide:
    """The choice among alternative folders.

    Attributes:
        used: the name of the folder.
        unused: the names of the others.
        is_video: whether the folders contain the images of one video.
    """

    used: str
    unused: tuple[str, ...]
    is_video: bool

    @property
    def note(self) -> str:
        """A note on the choice; "" without alternatives."""
        return f"{self.used}/ is used, not {', '.join(f'{name}/' for name in self.unused)}" if self.unused else ""


def side_by_side(folder: Path, names: Sequence[str]) -> SideBySide | None:
    """Chooses the folder with the colour frames or the videos among the folders in a folder.

    Args:
        folder: contains videos, classes, or one video.
        names: its content; a folder in it without folders, images and videos is not chosen.

    Returns:
        the choice; None if there is nothing to choose: a folder has an unknown name, such as that of a class or a
        video, none has a known name for colour frames or videos, or there is only one, unless it is `rgb` or similar in
        the folder of a video.

    Raises:
        UserError: several of them may contain the videos.
    """
    unknown = [name for name in names if folder_group(name).kind is Kind.UNKNOWN]
    if any(contains_videos(folder / name) for name in unknown):
        return None
    beside = [name for name in names if name not in unknown and os.path.isdir(folder / name)]
    known = [name for name in beside if contains_videos(folder / name)]
    chosen = colour_folders(known)
    if not chosen:
        return None
    is_video = contains_images(folder / chosen[0])
    if len(beside) == 1 and not (is_video and beside[0].lower() in FRAME_FOLDERS):
        return None  # nothing to choose: a class or video that is called `clip`, or one folder too high
    if len(chosen) > 1 and not is_video:  # in the folder of a video, reading its frames reports them
        raise UserError(
            f"{folder} contains {' and '.join(f'{name}/' for name in chosen)}, which may be the same videos: set the "
            "folder of the videos to the one to use, or move the other."
        )
    return SideBySide(chosen[0], tuple(name for name in known if name != chosen[0]), is_video)


OTHER_FORM = "named for another form of the videos beside it"


def other_forms(folder: Path, folders: Sequence[str], videos: Collection[str]) -> set[str]:
    """Returns the folders and videos of a class that are other forms of its videos: `thumbs`, `rgb`, `v1_flow`.

    Args:
        folder: the folder of the class.
        folders: the names of the folders in it.
        videos: the names of the video files in it, without suffixes.
    """
    forms = {name for name in folders if is_other_form(name)}
    has_video = bool(videos)
    if not has_video and forms:  # folders of images, or of `rgb` with images, are videos; the others may be classes
        beside = (folder / name for name in folders if name not in forms)
        has_video = any(contains_images(path / below) for path in beside for below in ("", *FRAME_FOLDERS))
    forms = forms if has_video else set()
    for name, originals in other_forms_by_name([*videos, *folders]).items():
        if any(original in videos or contains_images(folder / original) for original in originals):
            forms.add(name)
    return forms


def contains_videos(folder: Path) -> bool:
    """Returns whether a folder contains folders, images or videos, rather than nothing or text."""
    try:
        with os.scandir(folder) as entries:
            return any(entry.is_dir() or _is_media(entry.name) for entry in entries if entry.name[0] != ".")
    except OSError:
        return False


def _is_media(name: str) -> bool:
    return is_image_name(name) or os.path.splitext(name)[1].lower() in CONTAINER_SUFFIXES
