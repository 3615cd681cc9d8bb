"""Converts images of all pixel formats to uint8 RGB.

An image of more than 8 bits (16-bit grey or colour, 32-bit integer, float) is scaled linearly from the levels of its
video to 0..255. All frames of a video share the levels, so that its brightness does not flicker. The frames that set
the levels do not depend on the frames that are read. FFmpeg decodes colours of more than 8 bits a channel: Pillow keeps
only the high byte of each value.
"""

import io
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import av
import numpy as np
from PIL import ExifTags, Image

DEEP_MODES = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
ALPHA_MODES = frozenset({"RGBA", "LA", "PA"})
PERCENT_BEYOND = 0.1  # percent of the pixels at each end that the levels ignore: noise, depth artefacts

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
        image: the image, opened but not loaded.
        content: the content of its file.
        levels: returns the levels of its video, or None to use those of the image; called only for deep images.
    """
    values = deep_values(image, content)
    if values is None:
        colours = _on_black(image)
    else:
        scaled = _scaled(values, levels() or levels_of([values]))
        colours = Image.fromarray(np.broadcast_to(scaled, (*scaled.shape[:2], 3)).copy())
    return np.array(_upright(colours, image))


def deep_values(image: Image.Image, content: bytes) -> np.ndarray | None:
    """Returns the values [H, W, 1 or 3], of any type, of an image with more than 8 bits per channel, else None."""
    if has_deep_colour(image, content):
        return deep_colour(image, content)
    image.load()
    return np.asarray(image)[:, :, np.newaxis] if image.mode in DEEP_MODES else None


def _on_black(image: Image.Image) -> Image.Image:
    """Converts a loaded 8-bit image to RGB on a black background."""
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


# --- colours of more than 8 bits, with FFmpeg -------------------------------------------------------------

DECODERS = {"PNG": "png", "TIFF": "tiff", "PPM": "ppm", "SGI": "sgi", "JPEG2000": "jpeg2000"}  # format -> FFmpeg's
PACKED_CHANNELS = {"gray16": 1, "ya16": 2, "rgb48": 3, "rgba64": 4}
PLANAR = frozenset({"gbrp16", "gbrap16"})  # planes G, B, R and alpha
BITS_PER_SAMPLE = 258  # TIFF tag
JPEG2000_START = b"\xff\x4f\xff\x51"  # 36 bytes after it: the number of channels, then three bytes for each


def has_deep_colour(image: Image.Image, content: bytes) -> bool:
    """Returns whether Pillow would reduce the values of an image, opened but not loaded, to 8 bits."""
    if image.mode.startswith(("I", "F")) or image.format not in DECODERS:
        return False
    if image.format == "TIFF":  # by its tag, since Pillow treats planes of 16 bits as planes of 8
        return max(getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))) > 8
    if image.format == "JPEG2000":
        return _jpeg2000_bits(content) > 8
    stored = _stored(image)
    if image.format == "PPM":
        return any(isinstance(part, tuple) and isinstance(part[-1], int) and part[-1] > 255 for part in stored)
    return any(";16" in str(part) for part in stored)


def _stored(image: Image.Image) -> list[object]:
    """Returns Pillow's descriptions of the stored pixels: "RGB;16B" and similar; for PPM ("RGB", largest value)."""
    return [tile[3] for tile in getattr(image, "tile", ())]


def deep_colour(image: Image.Image, content: bytes) -> np.ndarray:
    """Decodes an image of deep colour to uint16 [H, W, 1 or 3]; transparent parts become black.

    Raises:
        ValueError: it is damaged, or FFmpeg does not support its kind, for example CMYK.
    """
    channels = _channels(image, _frame(image, content))
    if channels.shape[2] in (1, 3):
        return channels
    colours, alpha = channels[:, :, :-1], channels[:, :, -1:]
    has_alpha = image.mode in ("RGBA", "LA") or "transparency" in image.info
    is_multiplied = any("RGBa" in str(part) for part in _stored(image))
    if not has_alpha or is_multiplied or not alpha.any():
        return colours
    return np.rint(colours * (alpha / 65535)).astype(np.uint16)


def _frame(image: Image.Image, content: bytes) -> av.VideoFrame:
    """Decodes an image file with FFmpeg."""
    if image.mode not in ("L", "LA", "RGB", "RGBA"):  # FFmpeg treats the four channels of CMYK as colours and alpha
        raise _not_read(image)
    if image.format == "TIFF" and image.info.get("compression") != "raw":
        with Image.open(io.BytesIO(content), formats=["TIFF"]) as again:
            again.load()  # raises for a damaged strip, which FFmpeg leaves black
    decoder = av.CodecContext.create(DECODERS[str(image.format)], "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.thread_count = 1
    frames = [*decoder.decode(av.Packet(content)), *decoder.decode(None)]
    if not frames:
        raise ValueError("no frame can be decoded")
    return frames[0]


def _not_read(image: Image.Image) -> ValueError:
    return ValueError(
        f"{image.mode} with 16 bits per channel is not supported in a {image.format} file: save it as RGB PNG"
    )


def _channels(image: Image.Image, frame: av.VideoFrame) -> np.ndarray:
    """Returns the stored values of a frame, uint16 [H, W, C], red first and alpha last."""
    kind, order = frame.format.name[:-2], frame.format.name[-2:]
    planes = [
        np.frombuffer(memoryview(plane), dtype=">u2" if order == "be" else "<u2").reshape(-1, plane.line_size // 2)
        for plane in frame.planes
    ]
    if kind in PACKED_CHANNELS:
        number = PACKED_CHANNELS[kind]
        values = planes[0][: frame.height, : frame.width * number].reshape(frame.height, frame.width, number)
    elif kind in PLANAR:
        green, blue, red, *alpha = (plane[: frame.height, : frame.width] for plane in planes)
        values = np.stack([red, green, blue, *alpha], axis=2)
    else:
        raise _not_read(image)
    return values.astype(np.uint16)


def _jpeg2000_bits(content: bytes) -> int:
    """Returns the largest number of bits in a channel of a JPEG 2000 image."""
    start = content.find(JPEG2000_START) + len(JPEG2000_START) + 36
    channels = int.from_bytes(content[start : start + 2], "big")
    return max(((size & 127) + 1 for size in content[start + 2 : start + 2 + 3 * channels : 3]), default=0)
