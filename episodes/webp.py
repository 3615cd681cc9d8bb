"""Reads animated WebP files, which FFmpeg does not read; frames are composed as in a browser."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.WebPImagePlugin import WebPImageFile

from episodes.images import stack_frames, wanted_indices
from episodes.limits import LARGEST_IMAGE_FILE, check_file, check_frame_count, check_frame_size
from episodes.pixels import to_rgb
from episodes.video_files import FIRST_BYTES, is_animated_webp
from utils.errors import UserError, reason_of
from videotransforms.volume_transforms import FrameChooser


def is_webp_animation(path: Path) -> bool:
    """Returns whether a regular file is a WebP animation, regardless of its name."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return is_animated_webp(file.read(FIRST_BYTES))
    except OSError:
        return False


def read_webp(path: Path, choose: FrameChooser) -> np.ndarray:
    """Reads the chosen frames of an animation: uint8 [T, H, W, 3], RGB, transparent parts before black.

    Raises:
        UserError: it is damaged or too large.
        IndexError: `choose` returns a frame that does not exist.
    """
    with _opened(path) as image:
        indices = wanted_indices(choose, image.n_frames, path)
        frames = {index: _pixels(image, index) for index in sorted(set(indices))}
    return stack_frames(frames, indices, path)


def probe_webp(path: Path) -> int:
    """Decodes the first frame and returns the number of frames; raises UserError as `read_webp`."""
    with _opened(path) as image:
        _pixels(image, 0)
        return int(image.n_frames)


@contextmanager
def _opened(path: Path) -> Iterator[WebPImageFile]:
    try:
        check_file(path, LARGEST_IMAGE_FILE)
        with Image.open(path, formats=("WEBP",)) as image:
            assert isinstance(image, WebPImageFile)
            check_frame_size(path, *image.size)
            check_frame_count(path, image.n_frames)
            yield image
    except (UserError, IndexError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds of errors for damaged bytes
        raise UserError(
            f"Cannot decode the animation {path} ({reason_of(error)}): download it again, or remove it."
        ) from error


def _pixels(image: Image.Image, index: int) -> np.ndarray:
    """Returns one frame, uint8 [H, W, 3]."""
    image.seek(index)
    image.load()
    return to_rgb(image, b"", lambda: None)  # of 8 bits, so its content is not decoded again
