"""Limits on the size of videos and images, and on the time to read one.

Benchmark videos last a few seconds, and the limits are far above that. They reject damaged headers that announce
terabytes, unrelated files, and files made to exhaust a machine.
"""

import os
import stat
from pathlib import Path

from utils.errors import UserError
from utils.files import raise_if_lfs_pointer

LARGEST_FILE = 2 * 1024**3  # bytes
LARGEST_IMAGE_FILE = 64 * 1024**2  # bytes
LARGEST_FRAME = 7680 * 4320  # pixels
MAX_SCANS = 100  # of a JPEG; a progressive one has about ten, and each decodes the whole image again
MAX_FRAMES = 100_000  # more than an hour at 25 frames a second
MAX_READING_SECONDS = 120
LARGEST_MEMORY = 4 * 1024**3  # bytes, of the process that decodes


def check_file(path: Path, largest: int) -> int:
    """Returns the size of a regular file in bytes.

    Raises:
        UserError: it is a pipe or a device, which may block a reader forever, too large, or a Git LFS pointer.
        OSError: the file does not exist.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file: replace it with the file itself, or remove it.")
    if status.st_size > largest:
        raise UserError(
            f"{path} has {status.st_size:,} bytes, the limit is {largest:,}: cut or convert it, or remove it."
        )
    raise_if_lfs_pointer(path)
    return status.st_size


def check_frame_size(name: Path | str, width: int, height: int) -> None:
    """Raises UserError for frames of more than LARGEST_FRAME pixels."""
    if width * height > LARGEST_FRAME:
        raise UserError(
            f"The frames of {name} have {width} x {height} pixels, the limit is {LARGEST_FRAME:,}: "
            "scale the video down, or remove it."
        )


def check_frame_count(path: Path | str, count: int) -> None:
    """Raises UserError for a video of more than MAX_FRAMES frames."""
    if count > MAX_FRAMES:
        raise UserError(f"The video {path} has more than {MAX_FRAMES:,} frames: cut it into clips, or remove it.")


def check_scans(name: str, content: bytes) -> None:
    """Raises UserError for the bytes of a JPEG with so many scans that decoding could take hours."""
    # b"\xff\xda" starts a scan and never occurs in pixel data.
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > MAX_SCANS:
        raise UserError(
            f"Cannot decode {name} (it has more than {MAX_SCANS} scans, which may take hours): replace it or extract "
            "it again."
        )
