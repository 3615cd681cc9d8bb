"""Finds a user's clips: a support folder with one folder per class, and queries as files or folders."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from episodes.preparation.names import prompt_of, why_not_storable
from episodes.preparation.raw_layouts import LeftOut, RawVideo, is_raw_video, raw_videos
from episodes.search import composed, is_system_folder
from utils.errors import UserError
from utils.yaml_text import read_yaml_file

TEXT_FILE = "classes.yaml"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Support:
    """The clips and the text of each class.

    clips: class name -> paths.
    texts: class name -> text in a prompt.
    """

    clips: dict[str, list[Path]]
    texts: dict[str, str]


def read_support(root: Path) -> Support:
    """Finds the clips of a support folder: one folder per class with video files or folders of images in it.

    The text of a class comes from `classes.yaml` in the support folder (`class folder: text`), or from the words of
    its folder's name.

    Raises:
        UserError: the path is not a folder, there are fewer than two classes, a class has no clips, or `classes.yaml`
            is invalid.
    """
    if not root.is_dir():
        raise UserError(f"--support {root} is not a folder; use a folder that contains one folder per class")
    clips: dict[str, list[Path]] = {name: [] for name in _folders(root)}
    for video in _videos(root):
        if not video.above:
            where = "its images are in the class folder itself; put the images of each clip into a separate folder"
            reason = where if video.path.is_dir() else "it is not in a class folder"
            logger.warning("left out %s: %s", video.path, reason)
        elif video.above[0] in clips:
            clips[video.above[0]].append(video.path)
    if len(clips) < 2:
        found = f"one class folder, {next(iter(clips))}" if clips else "no class folder"
        raise UserError(f"--support {root}: expected a folder for each of two or more classes, found {found}")
    for name, paths in clips.items():
        if reason := why_not_storable(name):
            raise UserError(f"--support {root / name}: {reason}")
        if not paths:
            raise UserError(f"--support {root / name}: the class has no clip; add videos to the folder or remove it")
    return Support(clips, _texts(root, list(clips)))


def _videos(root: Path) -> list[RawVideo]:
    """Returns the clips below a folder; logs a warning for each possible clip that is skipped."""
    left_out: list[LeftOut] = []
    notes: list[str] = []
    videos = list(raw_videos(root, left_out=left_out, notes=notes))
    for note in notes:
        logger.warning("%s", note)
    for file in left_out:
        if file.may_be_video or file.path.is_dir():
            logger.warning("left out %s: %s", file.path, file.reason)
    return videos


def _folders(root: Path) -> list[str]:
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    return [name for name in names if not name.startswith(".") and not is_system_folder(name)]


def _texts(root: Path, classes: Sequence[str]) -> dict[str, str]:
    """Returns the text of each class, from `classes.yaml` or from the name of its folder."""
    path = root / TEXT_FILE
    texts = read_texts(path) if path.is_file() else {}
    spelled = {composed(name): name for name in classes}
    if unknown := sorted(texts.keys() - spelled.keys()):
        raise UserError(f"{path}: {unknown[0]!r} is not a class folder; the classes are {', '.join(classes)}")
    return {name: texts.get(composed(name), prompt_of(name)) for name in classes}


def read_texts(path: Path) -> dict[str, str]:
    """Reads class -> text from a `classes.yaml` file.

    Raises:
        UserError: the file is unreadable, or a text is missing.
    """
    given = read_yaml_file(path, str(path), "class text")
    for name, text in given.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: expected a text after '{name}:', found {text!r}; quote it if it is a number")
    return {composed(str(name)): text for name, text in given.items()}


def find_queries(paths: Sequence[Path]) -> list[Path]:
    """Returns the clips at the given paths in order: files, folders of images, and all clips below other folders.

    Raises:
        UserError: a path does not exist, or a folder contains no clip.
    """
    queries: dict[Path, None] = {}
    for path in paths:
        if not os.path.lexists(path):
            hint = "; write KEY=VALUE before the options" if "=" in str(path) else ""
            raise UserError(f"--query {path}: no such file or folder{hint}")
        clips = [video.path for video in _videos(path)] if path.is_dir() and not is_raw_video(path) else [path]
        if not clips:
            raise UserError(f"--query {path}: the folder contains no video and no folder of images")
        queries |= dict.fromkeys(clips)
    return list(queries)
