"""Pixels of images: bit depths, transparency, colour models and EXIF orientation."""

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from episodes.images import decode_image
from episodes.pixels import levels_of
from episodes.video import read_frames
from tests.helpers.images import SIDE, read
from utils.errors import UserError

RAMP = np.linspace(0, 1, 32 * 32).reshape(32, 32)
DEEP = {
    "12 bits in a 16-bit png": ("png", lambda share: (1000 + 3000 * share).astype(np.uint16)),
    "16-bit tif": ("tif", lambda share: (1 + 65533 * share).astype(np.uint16)),
    "thermal": ("tif", lambda share: (29000 + 2000 * share).astype(np.uint16)),
    "big endian": ("tif", lambda share: (1 + 4000 * share).astype(">u2")),
    "16-bit pgm": ("pgm", lambda share: (1 + 900 * share).astype(np.uint16)),
    "32-bit integer": ("tif", lambda share: (100_000 * share - 5_000).astype(np.int32)),
    "metres": ("tif", lambda share: (0.5 + 4 * share).astype(np.float32)),
    "pfm": ("pfm", lambda share: (1e-6 + 1e-5 * share).astype(np.float32)),
}


@pytest.mark.parametrize("case", DEEP)
def test_a_deep_image_keeps_its_contrast(tmp_path: Path, case: str) -> None:
    suffix, values = DEEP[case]
    for number in range(3):
        Image.fromarray(values(RAMP)).save(tmp_path / f"{number}.{suffix}")
    frames = read(tmp_path)
    assert frames.dtype == np.uint8
    assert (frames == frames[:, :, :, :1]).all()
    np.testing.assert_allclose(frames[1, :, :, 0], 255 * RAMP, atol=2)


def deep_file(path: Path, pixels: np.ndarray, form: str, decoder: str) -> None:
    """Writes uint16 [H, W, C] as an image file in which Pillow writes 8 bits only."""
    height, width, channels = pixels.shape
    encoder = av.codec.CodecContext.create(decoder, "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, height, form, Fraction(1, 25)
    frame = av.VideoFrame(width, height, form)
    (plane,) = frame.planes
    lines = np.zeros((height, plane.line_size // 2), dtype=">u2" if form.endswith("be") else "<u2")
    lines[:, : width * channels] = pixels.reshape(height, -1)
    plane.update(lines.tobytes())
    path.write_bytes(b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)]))


DEEP_COLOUR = {
    "png": ("rgb48be", "png", 3),
    "png with alpha": ("rgba64be", "png", 4),
    "png of grey with alpha": ("ya16be", "png", 2),
    "tif": ("rgb48le", "tiff", 3),
    "tif with alpha": ("rgba64le", "tiff", 4),
    "ppm": ("rgb48be", "ppm", 3),
    "jp2": ("rgb48le", "jpeg2000", 3),
}


@pytest.mark.parametrize("case", DEEP_COLOUR)
def test_deep_colour_keeps_its_contrast(tmp_path: Path, case: str) -> None:
    """12 bits in 16 fill the 256 values; the ratios between channels stay, and the levels are those of the video."""
    form, decoder, channels = DEEP_COLOUR[case]
    for number in (1, 2):
        pixels = np.rint(4095 * RAMP / number)[:, :, np.newaxis] * np.array([1, 0.5, 0.25, 1][:channels])
        if channels in (2, 4):
            pixels[:, :, -1] = 65535
        deep_file(tmp_path / f"{number}.{case.split()[0]}", pixels.astype(np.uint16), form, decoder)
    frames = read(tmp_path).astype(int)
    share = np.array([1, 0.5, 0.25] if channels > 2 else [1, 1, 1])
    for number in (1, 2):
        expected = 255 * RAMP[:, :, np.newaxis] * share / number
        assert np.abs(frames[number - 1] - expected).max() <= 2


def test_deep_colour_in_separate_planes_equals_that_in_one(tmp_path: Path) -> None:
    pixels = np.rint(4095 * RAMP)[:, :, np.newaxis] * np.array([1, 0.5, 0.25])
    (tmp_path / "one").mkdir()
    (tmp_path / "planes").mkdir()
    deep_file(tmp_path / "one/1.tif", pixels.astype(np.uint16), *DEEP_COLOUR["tif"][:2])
    planar_file(tmp_path / "planes/1.tif", pixels.astype(np.uint16))
    np.testing.assert_array_equal(read(tmp_path / "planes"), read(tmp_path / "one"))


def planar_file(path: Path, pixels: np.ndarray) -> None:
    """Writes uint16 [H, W, 3] as a TIFF file with a plane for each channel."""
    height, width, _ = pixels.shape
    size, data = 2 * height * width, pixels.transpose(2, 0, 1).astype("<u2").tobytes()
    end = 8 + len(data)  # after the pixels: the values that do not fit into an entry of the directory
    lists = np.array([8, 8 + size, 8 + 2 * size, *[size] * 3], "<u4").tobytes() + np.full(3, 16, "<u2").tobytes()
    short, long = 3, 4  # types
    entries = [
        (256, long, 1, width), (257, long, 1, height), (258, short, 3, end + 24), (259, short, 1, 1),
        (262, short, 1, 2), (273, long, 3, end), (277, short, 1, 3), (278, long, 1, height), (279, long, 3, end + 12),
        (284, short, 1, 2),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", end + len(lists)) + data + lists + directory)


def test_unsupported_deep_colour_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "1.tif"
    Image.new("CMYK", (4, 4)).save(plain)
    content = plain.read_bytes()
    eight_bits, sixteen_bits = np.full(4, 8, "<u2").tobytes(), np.full(4, 16, "<u2").tobytes()
    assert content.count(eight_bits) == 1
    pixels = content.index(eight_bits)  # the rest of the file is as before; its strip is shorter than it announces
    plain.write_bytes(content[:pixels] + sixteen_bits + content[pixels + 8 :] + bytes(128))
    with pytest.raises(UserError, match=r"1\.tif.*CMYK"):
        read(tmp_path)


def test_transparent_deep_colour_is_composited_on_black(tmp_path: Path) -> None:
    pixels = np.full((4, 4, 4), 60000, dtype=np.uint16)
    pixels[:, :, 3] = [65535, 32768, 0, 65535]
    pixels[0, 0, :3] = 1
    deep_file(tmp_path / "1.png", pixels, "rgba64be", "png")
    assert read(tmp_path)[0, 1, :, 0].tolist() == [255, 127, 0, 255]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_the_exif_orientation_of_deep_colour_is_applied(tmp_path: Path, suffix: str) -> None:
    upright = np.zeros((8, 6, 3), dtype=np.uint16)
    upright[:4], upright[:, 3:, 2] = 3000, 900
    stored = np.rot90(upright, 1)
    deep_file(tmp_path / f"1.{suffix}", stored, *DEEP_COLOUR[suffix][:2])
    plain = read(tmp_path)[0]
    with_orientation(tmp_path / f"1.{suffix}", 6)
    np.testing.assert_array_equal(read(tmp_path)[0], np.rot90(plain, -1))


def with_orientation(path: Path, orientation: int) -> None:
    """Adds an EXIF orientation to a PNG file or to the first directory of a little-endian TIFF file."""
    content = path.read_bytes()
    exif = Image.Exif()
    exif[0x112] = orientation
    if path.suffix == ".png":
        data = b"eXIf" + exif.tobytes()[6:]
        chunk = (len(data) - 4).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")
        path.write_bytes(content[:33] + chunk + content[33:])  # behind the header of the image
        return
    start = int.from_bytes(content[4:8], "little")
    number = int.from_bytes(content[start : start + 2], "little")
    entries = [content[start + 2 + 12 * entry : start + 14 + 12 * entry] for entry in range(number)]
    entry = np.array([0x112, 3], "<u2").tobytes() + np.array([1, orientation], "<u4").tobytes()
    entries = sorted([*entries, entry], key=lambda data: int.from_bytes(data[:2], "little"))
    directory = len(entries).to_bytes(2, "little") + b"".join(entries) + bytes(4)
    path.write_bytes(content[:4] + len(content).to_bytes(4, "little") + content[8:] + directory)


@pytest.mark.parametrize("missing", [0, 65535])
def test_pixels_without_data_do_not_affect_contrast(tmp_path: Path, missing: int) -> None:
    values = (800 + 3000 * RAMP).astype(np.uint16)
    values[:16] = missing
    Image.fromarray(values).save(tmp_path / "1.png")
    grey = read(tmp_path)[0, :, :, 0]
    assert (grey[:16] == (0 if missing == 0 else 255)).all()
    assert grey[16:].min() == 0
    assert grey[16:].max() == 255


def test_nan_pixels_become_black(tmp_path: Path) -> None:
    values = RAMP.astype(np.float32)
    values[0], values[1], values[2] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "1.tif")
    grey = read(tmp_path)[0, :, :, 0]
    assert grey[[0, 1, 2], 5].tolist() == [0, 255, 0]
    assert grey[3:].max() == 255


def test_deep_frames_share_the_scale_of_the_video(tmp_path: Path) -> None:
    """A wall keeps its brightness when brighter objects appear, for any choice of frames."""
    for number in range(20):
        values = np.full((32, 32), 1000, dtype=np.uint16)
        values[:, 0] = 200
        values[8:16, 8:16] = 1000 + 150 * number
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    frames = read(tmp_path)
    assert len(np.unique(frames[:, 20, 20, 0])) == 1
    assert (np.diff(frames[:, 10, 10, 0].astype(int)) > 3).all()
    np.testing.assert_array_equal(read_frames(tmp_path, lambda count: np.array([3, 4])), frames[3:5])


@pytest.mark.parametrize("value", [0, 700])
def test_a_flat_deep_image_is_flat(tmp_path: Path, value: int) -> None:
    Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(tmp_path / "1.png")
    assert len(np.unique(read(tmp_path))) == 1


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_transparent_pixels_are_composited_on_black(tmp_path: Path) -> None:
    picture = np.full((4, 4, 4), 200, dtype=np.uint8)
    picture[:, :, 3] = [255, 128, 0, 255]
    assert decode_image(encoded(Image.fromarray(picture)), "a")[0, :, 0].tolist() == [200, 100, 0, 200]
    assert decode_image(encoded(Image.fromarray(picture).convert("LA")), "a")[0, :, 0].tolist() == [200, 100, 0, 200]
    palette = Image.fromarray(np.tile(np.array([0, 1, 2, 1], dtype=np.uint8), (4, 1)), "L").convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 250])
    frame = decode_image(encoded(palette, transparency=0), "a")
    assert frame[0].tolist() == [[0, 0, 0], [200, 100, 0], [0, 0, 250], [200, 100, 0]]


def test_a_fully_transparent_image_shows_its_colours(tmp_path: Path) -> None:
    picture = np.full((4, 4, 4), 200, dtype=np.uint8)
    picture[:, :, 3] = 0
    assert (decode_image(encoded(Image.fromarray(picture)), "a") == 200).all()


def test_grey_bilevel_and_cmyk_images_are_read(tmp_path: Path) -> None:
    black_and_white = Image.fromarray(np.eye(4, dtype=bool))
    np.testing.assert_array_equal(decode_image(encoded(black_and_white), "a")[:, :, 1], 255 * np.eye(4))
    orange = Image.new("RGB", (8, 8), (250, 120, 10))
    for form in ("JPEG", "TIFF"):
        frame = decode_image(encoded(orange.convert("CMYK"), form), "a").astype(int)
        assert np.abs(frame - (250, 120, 10)).max() < 12


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_exif_orientation_is_applied(form: str) -> None:
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (240, 0, 0), (0, 240, 0), (0, 0, 240)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }  # fmt: skip
    for orientation, picture in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        frame = decode_image(encoded(Image.fromarray(np.ascontiguousarray(picture)), form, exif=exif), "a")
        assert frame.shape == upright.shape, orientation
        assert np.abs(frame.astype(int) - upright).mean() < 12, orientation


def test_damaged_exif_data_is_ignored() -> None:
    content = encoded(Image.new("RGB", (SIDE, SIDE), (90, 90, 90)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xf0broken")
    assert decode_image(content, "a").shape == (SIDE, SIDE, 3)


def test_single_outliers_do_not_change_the_levels():
    values = np.linspace(1000, 2000, 10_000).astype(np.uint16).reshape(100, 100, 1)
    values[0, 0], values[0, 1] = 1, 60_000
    levels = levels_of([values])
    assert 990 < levels.low < 1010
    assert 1990 < levels.high < 2010
