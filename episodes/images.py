"""Frames kept as images: their pixels, and the choice of some of them."""

import io
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from episodes.limits import LARGEST_IMAGE_FILE, check_file, check_frame_size, check_scans
from utils.errors import UserError, reason_of
from videotransforms.volume_transforms import FrameChooser

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
IMAGE_FORMATS = ("JPEG", "PNG")  # whatever the suffix says; to read others, Pillow starts other programs

# An image that would take gigabytes: Pillow warns from half its limit on.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def list_images(folder: Path) -> list[Path]:
    """List the images of a folder in the order of the numbers in their names: 2.jpg before 10.jpg.

    Raises UserError when the folder cannot be listed or holds no image.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"Cannot list the frame folder {folder}: {error.strerror}; check its permissions.") from error
    images = [name for name in names if _is_image_name(name)]
    if not images:
        raise UserError(
            f"The frame folder {folder} holds no image (.jpg, .jpeg or .png): extract its frames again, or "
            "remove the video from the list."
        )
    return [folder / name for name in sorted(images, key=_natural_key)]


def _is_image_name(name: str) -> bool:
    """Tell whether a file name is that of a frame; some systems put hidden companions beside each image."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _natural_key(name: str) -> tuple[list[int | str], str]:
    """Return a sort key that compares the runs of digits in a name as numbers."""
    parts = re.split(r"([0-9]+)", name)  # text and digits in turn, so that like is compared with like
    return [int(part) if position % 2 else part for position, part in enumerate(parts)], name


def read_image(path: Path) -> np.ndarray:
    """Read one image as uint8 [H, W, 3], RGB. Raises UserError when it cannot be read or decoded."""
    try:
        check_file(path, LARGEST_IMAGE_FILE)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the image {path} ({error.strerror}): replace it or extract it again.") from error
    return decode_image(content, f"the image {path}")


def decode_image(content: bytes, what: str) -> np.ndarray:
    """Decode the content of an image file to uint8 [H, W, 3], RGB.

    Raises UserError, which calls the image `what`, when it cannot be decoded.
    """
    check_scans(what, content)
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            check_frame_size(what, *image.size)
            # Converting copies, even what is RGB already.
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (UserError, MemoryError):
        raise
    except Exception as error:  # on damaged bytes Pillow stumbles in many ways, over an assertion or an index too
        reason = "no kind of image" if isinstance(error, Image.UnidentifiedImageError) else reason_of(error)
        raise UserError(f"Cannot decode {what} ({reason}): replace it or extract it again.") from error


def wanted_indices(choose: FrameChooser, count: int, video: Path | str) -> list[int]:
    """Return the indices that `choose` wants. Raises IndexError for one that is not below `count`."""
    indices = [int(index) for index in choose(count)]
    if not indices or min(indices) < 0 or max(indices) >= count:
        raise IndexError(f"frames {indices} were chosen of {video}, which has {count}")
    return indices


def stack_frames(frames: dict[int, np.ndarray], indices: Sequence[int], video: Path | str) -> np.ndarray:
    """Put the frames into the wanted order, uint8 [T, H, W, 3]. Raises UserError when their sizes differ."""
    first = frames[indices[0]]
    for frame in frames.values():
        if frame.shape != first.shape:
            raise sizes_differ(video, first.shape[:2], frame.shape[:2])
    return np.stack([frames[index] for index in indices])


def sizes_differ(video: Path | str, one: tuple[int, ...], other: tuple[int, ...]) -> UserError:
    """Return the error for a video in which frames of two sizes, each (height, width) in pixels, were found."""
    return UserError(
        f"The frames of {video} differ in size ({one[1]} x {one[0]} and {other[1]} x {other[0]} pixels): convert "
        "the video to one size, or remove it from the list."
    )
