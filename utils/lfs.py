"""Git LFS pointers: small text files that a clone without Git LFS holds in place of videos, images and weights."""

import os
from pathlib import Path

from utils.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_POINTER = 1024  # bytes, by its specification


def is_lfs_pointer(path: Path) -> bool:
    """Returns whether a file is a Git LFS pointer; a file that cannot be read is left to its reader."""
    try:
        if os.path.getsize(path) >= LARGEST_POINTER:
            return False
        with open(path, "rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def refuse_lfs_pointer(path: Path) -> None:
    """Raises UserError for a file that is a Git LFS pointer."""
    if is_lfs_pointer(path):
        raise UserError(
            f"{path} is a Git LFS pointer, a text in place of the file itself: run `git lfs pull` in the repository "
            "that it comes from, or download the file."
        )
