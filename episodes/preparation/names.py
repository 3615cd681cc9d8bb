"""Names of classes and videos: keys for comparing spellings, prompts, and names that cannot be stored."""

from __future__ import annotations

import os
import re

from episodes.search import composed
from episodes.video_files import VIDEO_SUFFIXES


def class_key(name: str) -> str:
    """Returns the key of a class, the same for all its spellings: `Closing [something]`, `closing_something`."""
    return "".join(character for character in composed(name).casefold() if character.isalnum())


def raw_video_name(file_name: str) -> str:
    """Returns the name of a video in an index: its file name without the suffix, or suffixes, of a video file."""
    stem, suffix = os.path.splitext(composed(file_name))
    return raw_video_name(stem) if suffix.lower() in VIDEO_SUFFIXES and stem else stem + suffix


def why_not_storable(name: str) -> str:
    """Returns why a video of this name cannot be listed or stored, or ""."""
    if any(character < " " or character in "\\/\x7f" for character in name):
        return "its name contains a control character or a backslash; rename it"
    if name != name.strip() or name.startswith("."):
        return "its name begins or ends with a space, or begins with a dot; rename it"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    return ""


def prompt_of(folder: str) -> str:
    """Returns the words of a class folder for CLIP's text tower: `CutBread`, `cut_bread` -> `cut bread`."""
    spaced = re.sub(r"[_\-.]+", " ", folder)
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Za-z])(?=\d)", " ", spaced)
    return " ".join(spaced.lower().split()) or folder
