"""A folder of images as a video: which images are frames, their order, and their pixels."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from episodes.images import find_frames
from episodes.video import probe
from tests.helpers.images import SIDE, read
from utils.errors import UserError


def write(folder: Path, *names: str) -> Path:
    """Writes images that show a number, the position of their name; the first of the names is the darkest."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (SIDE, SIDE), (number, number, number)).save(folder / name)
    return folder


def found(folder: Path) -> list[str]:
    return [path.name for path in find_frames(folder).images]


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
def test_frames_are_the_sequence_with_a_colour_name(tmp_path: Path, case: str) -> None:
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
def test_ambiguous_sequences_are_refused(tmp_path: Path, patterns: tuple[str, str]) -> None:
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


def test_a_message_names_only_some_of_many_sequences(tmp_path: Path) -> None:
    for second in range(600, 4200, 37):
        (tmp_path / f"{second // 3600:02}_{second // 60 % 60:02}_{second % 60:02}.jpg").touch()
    with pytest.raises(UserError, match=rf"{tmp_path.name}.*more\. Keep") as refusal:
        find_frames(tmp_path)
    assert len(str(refusal.value)) < 1000


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
def test_names_with_a_time_or_part_number_form_one_sequence(tmp_path: Path, names: list[str]) -> None:
    assert sorted(found(write(tmp_path, *names))) == sorted(names)
    assert find_frames(tmp_path).unused == ()


def test_the_only_sequence_is_used_under_any_name(tmp_path: Path) -> None:
    for name in ("depth_{}.png", "v_ApplyEyeMakeup_g01_c02_{:04}.jpg", "abcdefghij_-{:06}.jpg", "frame ({}).jpg"):
        folder = write(tmp_path / name[:3], *numbered(name))
        assert found(folder) == numbered(name)
        assert find_frames(folder).note == ""


def test_palette_images_beside_colour_frames_are_masks(tmp_path: Path) -> None:
    write(tmp_path, *numbered("{:05}.jpg"))
    for name in numbered("{:05}.png"):
        Image.new("P", (SIDE, SIDE), 1).save(tmp_path / name)
    assert found(tmp_path) == numbered("{:05}.jpg")
    assert "*.png" in find_frames(tmp_path).note


def test_unnumbered_images_beside_frames_are_not_frames(tmp_path: Path) -> None:
    write(tmp_path, *numbered("{:05}.jpg"), "cover.jpg", "mask.png")
    assert found(tmp_path) == numbered("{:05}.jpg")
    assert find_frames(write(tmp_path / "letters", "b.jpg", "a.jpg", "mask.png")).used == "a.jpg, ..."


def test_one_sequence_may_have_two_formats(tmp_path: Path) -> None:
    write(tmp_path, "1.jpg", "2.JPG", "3.png", "10.jpeg")
    assert found(tmp_path) == ["1.jpg", "2.JPG", "3.png", "10.jpeg"]


def test_frames_may_be_in_a_colour_folder(tmp_path: Path) -> None:
    write(tmp_path / "rgb", *numbered("{:05}.jpg"))
    write(tmp_path / "flow", *numbered("flow_x_{:05}.jpg"), *numbered("flow_y_{:05}.jpg"))
    assert [path.parent.name for path in find_frames(tmp_path).images] == ["rgb"] * 12
    assert "flow/" in find_frames(tmp_path).note
    assert probe(tmp_path) == 12
    write(tmp_path / "images", "00001.jpg")
    with pytest.raises(UserError, match=r"images/.*rgb/"):
        read(tmp_path)


def test_an_unsupported_image_format_is_named(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.exr").write_bytes(b"v/1\1")
    with pytest.raises(UserError, match=r"3 \.exr"):
        read(tmp_path)


# --- the order of frames -----------------------------------------------------------------------------------


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
        ["20240131_0001.jpg", "20240131_0002.jpg", "20240201_0003.jpg", "20240201_0004.jpg"],
        ["a_1_jpg.rf.3fa9.jpg", "a_2_jpg.rf.0b7e5.jpg", "a_10_jpg.rf.ffc2d.jpg"],
    ],
)
def test_frames_are_ordered_by_number(tmp_path: Path, names: list[str]) -> None:
    assert read(write(tmp_path, *names))[:, 0, 0, 0].tolist() == pytest.approx(range(len(names)), abs=1)
    assert found(tmp_path) == names


# --- formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "jfif", "png", "bmp", "tif", "tiff", "webp", "gif", "ppm", "jp2", "j2k",
                                    "avif", "tga", "qoi", "sgi", "pcx"])  # fmt: skip
def test_every_format_decoded_by_pillow_is_read(tmp_path: Path, suffix: str) -> None:
    picture = np.zeros((16, 24, 3), dtype=np.uint8)
    picture[:, 12:] = (200, 100, 40)
    for number in (2, 10, 1):
        Image.fromarray(picture // number).save(tmp_path / f"{number}.{suffix}")
    frames = read(tmp_path).astype(int)
    assert np.abs(frames - np.stack([picture // number for number in (1, 2, 10)])).mean() < 3
    assert np.array_equal(read(tmp_path), frames)


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif", "png"])
def test_a_multi_page_image_is_not_a_frame(tmp_path: Path, suffix: str) -> None:
    pictures = [Image.new("RGB", (SIDE, SIDE), (80 * number, 0, 0)) for number in range(3)]
    pictures[0].save(tmp_path / f"1.{suffix}", save_all=True, append_images=pictures[1:])
    with pytest.raises(UserError, match=rf"1\.{suffix}.*several pictures"):
        read(tmp_path)
