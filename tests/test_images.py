"""A folder of images as a video: which images are its frames, in which order, and what their pixels become."""

import io
import itertools
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from episodes.images import decode_image, find_frames
from episodes.video import probe, read_frames
from utils.errors import UserError

SIDE = 8


def write(folder: Path, *names: str) -> Path:
    """Writes images that show a number, the position of their name; the first of the names is the darkest."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (SIDE, SIDE), (number, number, number)).save(folder / name)
    return folder


def found(folder: Path) -> list[str]:
    return [path.name for path in find_frames(folder).images]


def read(folder: Path) -> np.ndarray:
    return read_frames(folder, np.arange)


def numbered(pattern: str, first: int = 1, last: int = 12) -> list[str]:
    return [pattern.format(number) for number in range(first, last + 1)]


# --- which images ------------------------------------------------------------------------------------------

COLOUR_AND_OTHERS = {
    "denseflow": ("img_{:05}.jpg", ["flow_x_{:05}.jpg", "flow_y_{:05}.jpg"]),
    "image": ("image_{:05}.jpg", ["flow_{:05}.jpg"]),
    "prefix and suffix": ("S001C001_{}_rgb.png", ["S001C001_{}_depth.png", "S001C001_{}_ir.png"]),
    "masks by suffix": ("{:05}.jpg", ["{:05}_mask.png"]),
    "thumbnails": ("frame{:03}.png", ["frame{:03}_thumb.png"]),
    "words of the video": ("v_MaskedDance_g01_c02_{:04}.jpg", ["v_MaskedDance_g01_c02_{:04}_pose.jpg"]),
    "second camera": ("{:05}.jpg", ["{:05}_cam2.jpg"]),
    "axes": ("rgb{}.jpg", ["u{}.jpg", "v{}.jpg"]),
}


@pytest.mark.parametrize("case", COLOUR_AND_OTHERS)
def test_frames_are_the_one_sequence_with_a_colour_name(tmp_path: Path, case: str) -> None:
    colour, others = COLOUR_AND_OTHERS[case]
    write(tmp_path, *numbered(colour), *itertools.chain(*(numbered(other, first=0) for other in others)))
    frames = find_frames(tmp_path)
    assert [path.name for path in frames.images] == numbered(colour)
    assert colour[: colour.index("{")] in frames.note
    assert len(frames.unused) == len(others)
    assert probe(tmp_path) == len(read(tmp_path)) == 12


@pytest.mark.parametrize(
    "patterns",
    [
        ("cam1_{:05}.jpg", "cam2_{:05}.jpg"),
        ("{:05}_cam1.jpg", "{:05}_cam2.jpg"),
        ("img_left_{}.jpg", "img_right_{}.jpg"),
        ("img_{}.jpg", "frame_{}.jpg"),
        ("img_{}.jpg", "img_{}.png"),
        ("flow_x_{}.jpg", "flow_y_{}.jpg"),
        ("{}.jpg", "{:05}.jpg"),
        ("1_{}.jpg", "2_{}.jpg"),
    ],
)
def test_several_sequences_that_may_be_the_frames_are_refused(tmp_path: Path, patterns: tuple[str, str]) -> None:
    write(tmp_path, *numbered(patterns[0]), *numbered(patterns[1]))
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    for pattern in patterns:
        assert pattern.format(1) in str(caught.value)
    with pytest.raises(UserError, match=str(tmp_path)):
        probe(tmp_path)


@pytest.mark.parametrize(
    "pattern", ["cam{}_{:03}.jpg", "{}_{:03}.jpg", "{1:03}_cam{0}.jpg", "img_{}_{:03}.png", "S1C{}_frame_{:03}.jpg"]
)
@pytest.mark.parametrize("cameras", [(0, 0, 0, 1, 1, 1), (2, 1, 2, 1, 2, 1)])
def test_cameras_without_a_common_frame_number_are_several_sequences(
    tmp_path: Path, pattern: str, cameras: tuple[int, ...]
) -> None:
    names = [pattern.format(camera, number) for number, camera in enumerate(cameras)]
    with pytest.raises(UserError) as caught:
        find_frames(write(tmp_path, *names))
    for camera in set(cameras):
        assert names[cameras.index(camera)] in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        [f"shot{number // 3}_frame{number:03}.jpg" for number in range(9)],
        [f"part_{number // 5 + 9}_{number + 1}.jpg" for number in range(12)],
        [f"frame_{number:04}_{number // 4}s.jpg" for number in range(12)],
        [f"{number // 4}m_{number:04}.jpg" for number in range(12)],
        [f"13050311{number // 4:02}_{number:04}.png" for number in range(12)],
        [f"frame_{number:03}_{100 - 7 * number}.jpg" for number in range(12)],
        [f"frame_{number:03}_time_{0.25 * (number // 4)}.jpg" for number in range(12)],
    ],
)
def test_a_time_or_a_part_of_the_video_beside_the_frame_number_is_one_sequence(
    tmp_path: Path, names: list[str]
) -> None:
    assert sorted(found(write(tmp_path, *names))) == sorted(names)
    assert find_frames(tmp_path).unused == ()


def test_the_only_sequence_is_used_under_any_name(tmp_path: Path) -> None:
    for name in ("depth_{}.png", "v_ApplyEyeMakeup_g01_c02_{:04}.jpg", "abcdefghij_-{:06}.jpg", "frame ({}).jpg"):
        folder = write(tmp_path / name[:3], *numbered(name))
        assert found(folder) == numbered(name)
        assert find_frames(folder).note == ""


def test_a_palette_beside_colour_frames_is_their_mask(tmp_path: Path) -> None:
    write(tmp_path, *numbered("{:05}.jpg"))
    for name in numbered("{:05}.png"):
        Image.new("P", (SIDE, SIDE), 1).save(tmp_path / name)
    assert found(tmp_path) == numbered("{:05}.jpg")
    assert "*.png" in find_frames(tmp_path).note


def test_images_without_a_number_beside_frames_are_not_frames(tmp_path: Path) -> None:
    write(tmp_path, *numbered("{:05}.jpg"), "cover.jpg", "mask.png")
    assert found(tmp_path) == numbered("{:05}.jpg")
    assert find_frames(write(tmp_path / "letters", "b.jpg", "a.jpg", "mask.png")).used == "a.jpg, ..."


def test_one_sequence_in_two_formats_is_one(tmp_path: Path) -> None:
    write(tmp_path, "1.jpg", "2.JPG", "3.png", "10.jpeg")
    assert found(tmp_path) == ["1.jpg", "2.JPG", "3.png", "10.jpeg"]


def test_frames_may_lie_in_a_colour_folder_beside_others(tmp_path: Path) -> None:
    write(tmp_path / "rgb", *numbered("{:05}.jpg"))
    write(tmp_path / "flow", *numbered("flow_x_{:05}.jpg"), *numbered("flow_y_{:05}.jpg"))
    assert [path.parent.name for path in find_frames(tmp_path).images] == ["rgb"] * 12
    assert "flow/" in find_frames(tmp_path).note
    assert probe(tmp_path) == 12
    write(tmp_path / "images", "00001.jpg")
    with pytest.raises(UserError, match=r"images/.*rgb/"):
        read(tmp_path)


def test_a_folder_of_a_format_that_is_not_read_names_it(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.exr").write_bytes(b"v/1\1")
    with pytest.raises(UserError, match=r"3 \.exr"):
        read(tmp_path)


# --- in which order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["frame_0s.jpg", "frame_0.25s.jpg", "frame_0.5s.jpg", "frame_1s.jpg", "frame_1.25s.jpg", "frame_10s.jpg"],
        ["0.0.jpg", "1e-05.jpg", "0.04.jpg", "0.2.jpg", "1.0.jpg", "1.04.jpg", "12.0.jpg"],
        ["t0,5.jpg", "t0,75.jpg", "t1,0.jpg"],
        ["\uff11.jpg", "\uff12.jpg", "\uff11\uff10.jpg"],
        ["1305031102.175304.png", "1305031102.211214.png", "1305031103.011215.png"],
        ["t_-10.jpg", "t_-2.jpg", "t_0.jpg", "t_1.jpg"],
        ["a-1.jpg", "a-2.jpg", "a-10.jpg"],
        ["a_-1.jpg", "a_-2.jpg", "a_-10.jpg"],
        ["1.8.jpg", "1.9.jpg", "1.10.jpg", "1.11.jpg"],
        ["frame_1_0.0.jpg", "frame_2_0.5.jpg", "frame_10_4.5.jpg"],
        ["12-59-58.jpg", "12-59-59.jpg", "13-00-58.jpg", "13-00-59.jpg"],
        ["20240131_125958_000.jpg", "20240131_125958_500.jpg", "20240131_125959_000.jpg", "20240131_125959_500.jpg"],
        ["a_1_jpg.rf.3fa9.jpg", "a_2_jpg.rf.0b7e5.jpg", "a_10_jpg.rf.ffc2d.jpg"],
    ],
)
def test_numbers_in_names_order_the_frames(tmp_path: Path, names: list[str]) -> None:
    assert read(write(tmp_path, *names))[:, 0, 0, 0].tolist() == pytest.approx(range(len(names)), abs=1)
    assert found(tmp_path) == names


# --- formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "jfif", "png", "bmp", "tif", "tiff", "webp", "gif", "ppm", "jp2", "j2k",
                                    "avif", "tga", "qoi", "sgi", "pcx"])  # fmt: skip
def test_every_format_that_pillow_decodes_itself_is_read(tmp_path: Path, suffix: str) -> None:
    picture = np.zeros((16, 24, 3), dtype=np.uint8)
    picture[:, 12:] = (200, 100, 40)
    for number in (2, 10, 1):
        Image.fromarray(picture // number).save(tmp_path / f"{number}.{suffix}")
    frames = read(tmp_path).astype(int)
    assert np.abs(frames - np.stack([picture // number for number in (1, 2, 10)])).mean() < 3
    assert np.array_equal(read(tmp_path), frames)


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif", "png"])
def test_an_image_of_several_pictures_is_not_a_frame(tmp_path: Path, suffix: str) -> None:
    pictures = [Image.new("RGB", (SIDE, SIDE), (80 * number, 0, 0)) for number in range(3)]
    pictures[0].save(tmp_path / f"1.{suffix}", save_all=True, append_images=pictures[1:])
    with pytest.raises(UserError, match=rf"1\.{suffix}.*several pictures"):
        read(tmp_path)


# --- pixels ------------------------------------------------------------------------------------------------

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
    planes = pixels[:, :, [1, 2, 0, 3][:channels]].transpose(2, 0, 1) if form.startswith("gbr") else [pixels]
    for plane, values in zip(frame.planes, planes, strict=True):
        lines = np.zeros((height, plane.line_size // 2), dtype=">u2" if form.endswith("be") else "<u2")
        lines[:, : values[0].size] = values.reshape(height, -1)
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


def test_deep_colour_of_a_kind_that_is_not_read_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "1.tif"
    Image.new("CMYK", (4, 4)).save(plain)
    content = plain.read_bytes()
    eight_bits, sixteen_bits = np.full(4, 8, "<u2").tobytes(), np.full(4, 16, "<u2").tobytes()
    assert content.count(eight_bits) == 1
    pixels = content.index(eight_bits)  # the rest of the file is as before; its strip is shorter than it announces
    plain.write_bytes(content[:pixels] + sixteen_bits + content[pixels + 8 :] + bytes(128))
    with pytest.raises(UserError, match=r"1\.tif.*CMYK"):
        read(tmp_path)


def test_transparent_deep_colour_lies_before_black(tmp_path: Path) -> None:
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
    """Adds an EXIF orientation to a PNG file, or put it into the first directory of a little-endian TIFF file."""
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
def test_pixels_without_a_measurement_take_no_contrast(tmp_path: Path, missing: int) -> None:
    values = (800 + 3000 * RAMP).astype(np.uint16)
    values[:16] = missing
    Image.fromarray(values).save(tmp_path / "1.png")
    grey = read(tmp_path)[0, :, :, 0]
    assert (grey[:16] == (0 if missing == 0 else 255)).all()
    assert grey[16:].min() == 0
    assert grey[16:].max() == 255


def test_what_is_not_a_number_becomes_black(tmp_path: Path) -> None:
    values = RAMP.astype(np.float32)
    values[0], values[1], values[2] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "1.tif")
    grey = read(tmp_path)[0, :, :, 0]
    assert grey[[0, 1, 2], 5].tolist() == [0, 255, 0]
    assert grey[3:].max() == 255


def test_the_scale_of_deep_frames_is_that_of_the_video(tmp_path: Path) -> None:
    """A wall stays as bright as it is while something brighter comes and goes, in whichever frames are read."""
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


def test_transparent_pixels_lie_before_black(tmp_path: Path) -> None:
    picture = np.full((4, 4, 4), 200, dtype=np.uint8)
    picture[:, :, 3] = [255, 128, 0, 255]
    assert decode_image(encoded(Image.fromarray(picture)), "a")[0, :, 0].tolist() == [200, 100, 0, 200]
    assert decode_image(encoded(Image.fromarray(picture).convert("LA")), "a")[0, :, 0].tolist() == [200, 100, 0, 200]
    palette = Image.fromarray(np.tile(np.array([0, 1, 2, 1], dtype=np.uint8), (4, 1)), "L").convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 250])
    frame = decode_image(encoded(palette, transparency=0), "a")
    assert frame[0].tolist() == [[0, 0, 0], [200, 100, 0], [0, 0, 250], [200, 100, 0]]


def test_an_image_that_is_all_transparent_shows_its_colours(tmp_path: Path) -> None:
    picture = np.full((4, 4, 4), 200, dtype=np.uint8)
    picture[:, :, 3] = 0
    assert (decode_image(encoded(Image.fromarray(picture)), "a") == 200).all()


def test_grey_black_and_white_and_print_colours_are_read(tmp_path: Path) -> None:
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


def test_damaged_exif_data_costs_no_frame() -> None:
    content = encoded(Image.new("RGB", (SIDE, SIDE), (90, 90, 90)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xf0broken")
    assert decode_image(content, "a").shape == (SIDE, SIDE, 3)
