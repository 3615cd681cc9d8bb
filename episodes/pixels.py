"""Converts images of all pixel formats to uint8 RGB.

An image of more than 8 bits (16-bit grey or colour, 32-bit integer, float) is scaled linearly from the levels of its
video to 0..255. All frames of a video share the levels, so that its brightness does not flicker. The frames that set
the levels do not depend on the frames that are read.
"""

import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from episodes.deep_colour import deep_colour, has_deep_colour

DEEP_MODES = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
ALPHA_MODES = frozenset({"RGBA", "LA", "PA"})
PERCENT_BEYOND = 0.1  # percent of the pixels on each side that may exceed the levels: noise, depth artefacts

# EXIF orientation -> the operation that puts the image upright; Pillow does this for TIFF images while loading.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Levels(NamedTuple):
    """The values that become 0 and 255."""

    low: float
    high: float


def to_rgb(image: Image.Image, content: bytes, levels: Callable[[], Levels | None]) -> np.ndarray:
    """Decodes an opened image to uint8 [H, W, 3], RGB, turned according to its EXIF orientation.

    Grey is repeated, a palette looked up, CMYK and others converted. Transparent parts become black, but the
    transparency of an entirely transparent image is ignored.

    Args:
        image: the image, just opened.
        content: of its file.
        levels: returns the levels of its video, or None to use those of the image; called only for deep images.
    """
    values = deep_values(image, content)
    if values is None:
        colours = _before_black(image)
    else:
        scaled = _scaled(values, levels() or levels_of([values]))
        colours = Image.fromarray(np.broadcast_to(scaled, (*scaled.shape[:2], 3)).copy())
    return np.array(_upright(colours, image))


def deep_values(image: Image.Image, content: bytes) -> np.ndarray | None:
    """Returns the values [H, W, 1 or 3], of any type, of images with more than 8 bits per channel, else None."""
    if has_deep_colour(image, content):
        return deep_colour(image, content)
    image.load()
    return np.asarray(image)[:, :, np.newaxis] if image.mode in DEEP_MODES else None


def _before_black(image: Image.Image) -> Image.Image:
    """Returns a loaded 8-bit image as RGB on a black background."""
    colours = image if image.mode == "RGB" else image.convert("RGB")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        opaque = image.convert("RGBA").getchannel("A")
        if opaque.getextrema() != (0, 0):
            return Image.composite(colours, Image.new("RGB", image.size), opaque)
    return colours


def levels_of(frames: Iterable[np.ndarray]) -> Levels:
    """Computes the levels of a video from the values of some of its frames, [H, W, C] each, of any type.

    Zero and the largest value of an integer type mean "nothing measured" in depth images. They and non-finite values
    are ignored unless there are no others.
    """
    values = np.concatenate([frame.ravel() for frame in frames])
    values = values[np.isfinite(values)]
    measured = values[values != 0]
    if np.issubdtype(values.dtype, np.integer):
        measured = measured[measured != np.iinfo(values.dtype).max]
    for counted in (measured, values):
        if counted.size and counted.min() < counted.max():
            low, high = np.percentile(counted, [PERCENT_BEYOND, 100 - PERCENT_BEYOND])
            if low < high:
                return Levels(float(low), float(high))
            return Levels(float(counted.min()), float(counted.max()))
    return Levels(0.0, float(values.max())) if values.size and values.max() > 0 else Levels(0.0, 1.0)


def _scaled(values: np.ndarray, levels: Levels) -> np.ndarray:
    """Scales values so that the levels become 0 and 255: uint8 of the same shape; NaN becomes 0."""
    share = (values.astype(np.float64) - levels.low) / (levels.high - levels.low)
    return np.rint(255 * np.clip(np.nan_to_num(share, nan=0.0, posinf=1.0, neginf=0.0), 0, 1)).astype(np.uint8)


def _upright(colours: Image.Image, image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation of an image to its colours; damaged EXIF data is ignored."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):  # from Pillow
        return colours
    return colours if turn is None else colours.transpose(turn)
