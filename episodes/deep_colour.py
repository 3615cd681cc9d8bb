"""Decodes colour images of more than 8 bits a channel with FFmpeg: Pillow keeps only the high byte of each value."""

import io

import av
import numpy as np
from PIL import Image

DECODERS = {"PNG": "png", "TIFF": "tiff", "PPM": "ppm", "SGI": "sgi", "JPEG2000": "jpeg2000"}  # format -> FFmpeg's
PACKED_CHANNELS = {"gray16": 1, "ya16": 2, "rgb48": 3, "rgba64": 4}
PLANAR = frozenset({"gbrp16", "gbrap16"})  # planes G, B, R and alpha
BITS_PER_SAMPLE = 258  # TIFF tag
JPEG2000_START = b"\xff\x4f\xff\x51"  # 36 bytes after it: the number of channels, then three bytes for each


def has_deep_colour(image: Image.Image, content: bytes) -> bool:
    """Returns whether Pillow would cut the values of an opened image, not yet loaded, down to 8 bits."""
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
    """Returns Pillow's notes on how pixels are stored: "RGB;16B" and similar or, of PPM, ("RGB", largest value)."""
    return [tile[3] for tile in getattr(image, "tile", ())]


def deep_colour(image: Image.Image, content: bytes) -> np.ndarray:
    """Decodes an image of deep colour to uint16 [H, W, 1 or 3]; transparent parts become black.

    Raises:
        ValueError: it is damaged, or of a kind that FFmpeg does not read, CMYK for example.
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
