"""Frames of a video: correct, equal from every reader, and one sentence for every broken file."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock, call

import av
import numpy as np
import pytest
from PIL import Image

from episodes import video
from tests.helpers.videos import (
    ALL,
    CHOICES,
    EXACT_IN_DECORD,
    NUM_FRAMES,
    OTHERS,
    REAL,
    choose_all,
    choose_random,
    choose_spread,
    numbers,
    paint,
    read_all,
    read_number,
    render,
)
from utils.errors import UserError


@pytest.fixture
def without_decord(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads as on a machine where decord cannot be imported."""
    monkeypatch.setattr(video, "_decord", lambda: None)


READERS = [video.probe, read_all]


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.usefixtures("without_decord")
def test_pyav_returns_the_chosen_frames(videos: Path, name: str, choose: Callable[[int], np.ndarray]) -> None:
    frames = video.read_frames(videos / name, choose)
    assert frames.dtype == np.uint8
    assert frames.flags.c_contiguous
    assert frames.shape[1:] == (*ALL[name][2], 3)
    assert [read_number(frame) for frame in frames] == choose(NUM_FRAMES).tolist()


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("name", EXACT_IN_DECORD)
def test_decord_returns_the_chosen_frames(
    videos: Path, name: str, choose: Callable[[int], np.ndarray], decord_uses: list[bool]
) -> None:
    assert numbers(videos / name, choose) == choose(NUM_FRAMES).tolist()
    assert decord_uses == [True]


@pytest.mark.parametrize("name", OTHERS)
def test_videos_that_decord_misreads_are_read_with_pyav(videos: Path, name: str, decord_uses: list[bool]) -> None:
    assert numbers(videos / name, choose_random) == choose_random(NUM_FRAMES).tolist()
    assert True not in decord_uses


@pytest.mark.parametrize("name", EXACT_IN_DECORD)
def test_decord_and_pyav_agree_on_the_pixels(
    videos: Path, name: str, decord_uses: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_decord = read_all(videos / name).astype(int)
    monkeypatch.setattr(video, "_decord", lambda: None)
    by_pyav = read_all(videos / name)
    assert decord_uses == [True, False]
    assert np.abs(by_decord - by_pyav).mean() < 0.1  # of 255; odd sizes are converted with other rounding


@pytest.mark.parametrize(
    ("name", "length", "expected"), [("h264.mp4", 4, True), ("h264.mp4", 5, False), ("h264_one_group.mp4", 1, False)]
)
def test_decord_is_used_only_where_it_can_seek(videos: Path, name: str, length: int, expected: bool) -> None:
    with video.open_video(videos / name) as (container, stream):
        packets = video._read_packets(container, stream)  # 50 frames: 5 groups of at most 12, or 1 of 250
        assert video._decord_is_exact(container, stream, packets)
        assert video._decord_is_faster(packets, list(range(length))) is expected


@pytest.mark.parametrize("name", ALL)
def test_probing_counts_enough_frames_without_a_header_count(videos: Path, name: str) -> None:
    assert video.probe(videos / name, enough=8) in (8, NUM_FRAMES)
    assert video.probe(videos / name, enough=NUM_FRAMES + 1) == NUM_FRAMES


def test_a_short_video_repeats_its_end(tmp_path: Path) -> None:
    path = render(tmp_path / "short.mp4", "libx264", {}, (72, 96), num_frames=3)
    assert numbers(path, choose_spread) == [0, 1, 2, 2, 2, 2, 2, 2]


def test_frames_hidden_by_an_edit_list_are_not_frames(videos: Path, tmp_path: Path, decord_uses: list[bool]) -> None:
    path = tmp_path / "cut.mp4"
    hidden = 5
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(videos / "h264.mp4")) as source, av.open(str(path), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts -= hidden * packet.duration
                packet.dts -= hidden * packet.duration
                packet.stream = stream
                target.mux(packet)
    assert numbers(path, choose_all) == list(range(hidden, NUM_FRAMES))
    assert decord_uses == []


def test_frames_are_chosen_again_if_the_beginning_is_missing(
    videos: Path, tmp_path: Path, decord_uses: list[bool]
) -> None:
    path = tmp_path / "late.mp4"
    with av.open(str(videos / "h264.mp4")) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in [packet for packet in source.demux(video=0) if packet.size][4:]:
            packet.stream = stream
            target.mux(packet)
    choose = Mock(side_effect=choose_all)
    assert numbers(path, choose) == list(range(12, NUM_FRAMES))
    assert choose.call_args_list == [call(NUM_FRAMES - 4), call(NUM_FRAMES - 12)]
    assert decord_uses == []


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "mpeg4.avi", "mpeg1.mpg"])
def test_a_truncated_file_gives_its_readable_frames(
    videos: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    content = (videos / name).read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    frames = read_all(path)
    assert 0 < len(frames) < NUM_FRAMES
    assert [read_number(frame) for frame in frames[:8]] == list(range(8))
    np.testing.assert_array_equal(frames, read_all(path))
    assert capfd.readouterr().err == ""


def test_damaged_frames_are_skipped_silently(videos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "damaged.avi"
    content = bytearray((videos / "mpeg4.avi").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300] = bytes(300)
    path.write_bytes(content)
    assert NUM_FRAMES // 2 < len(read_all(path)) <= NUM_FRAMES
    assert capfd.readouterr().err == ""


def write_audio(path: Path) -> None:
    """Writes a file with audio and no video."""
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def broken_file(kind: str, folder: Path, videos: Path) -> Path:
    """Writes a file that cannot be read as a video, and returns its path."""
    path = folder / f"{kind}.mp4"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("This is not a video.\n" * 50)
    elif kind == "sound":
        write_audio(path)
    elif kind == "header_only":
        content = (videos / "h264.mp4").read_bytes()
        path.write_bytes(content[: content.index(b"mdat") + 4])
    elif kind == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    return path


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", ["missing", "empty", "text", "sound", "header_only", "garbage"])
def test_broken_files_are_reported_in_one_sentence(
    videos: Path, tmp_path: Path, kind: str, read: Callable[[Path], object], capfd: pytest.CaptureFixture[str]
) -> None:
    path = broken_file(kind, tmp_path, videos)
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.endswith(".")
    assert "\n" not in message
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read every file")
def test_a_forbidden_file_is_reported(videos: Path, tmp_path: Path) -> None:
    path = tmp_path / "forbidden.mp4"
    shutil.copy(videos / "h264.mp4", path)
    path.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        video.probe(path)


def test_a_change_of_frame_size_is_refused(tmp_path: Path) -> None:
    # A program stream is a plain sequence of packs, so that two files in a row are one video.
    path = tmp_path / "two_sizes.mpg"
    parts = [render(tmp_path / f"{width}.mpg", "mpeg2video", {}, (72, width), num_frames=10) for width in (96, 128)]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(UserError, match=r"differ in size \(96 x 72 and 128 x 72 pixels\)"):
        video.read_frames(path, lambda num_frames: np.zeros(8, dtype=np.int64))


@pytest.mark.parametrize("wrong", [[-1], [NUM_FRAMES], []])
def test_choosing_a_missing_frame_is_refused(videos: Path, wrong: list[int]) -> None:
    with pytest.raises(IndexError, match=str(NUM_FRAMES)):
        video.read_frames(videos / "h264.mp4", lambda num_frames: np.array(wrong))


def write_images(folder: Path, names: list[str]) -> list[np.ndarray]:
    """Writes one image per name, image i showing i, and returns the decoded frames."""
    folder.mkdir()
    for number, name in enumerate(names):
        Image.fromarray(paint(number, 71, 97)).save(folder / name)
    return [np.asarray(Image.open(folder / name).convert("RGB")) for name in names]


def test_a_folder_is_read_in_numerical_order(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    images = write_images(folder, ["1.jpg", "2.JPG", "10.jpeg", "11.png"])
    (folder / "notes.txt").write_text("not a frame")
    (folder / "._1.jpg").write_bytes(b"not a frame either")
    frames = video.read_frames(folder, lambda num_frames: np.array([0, 1, 2, 3, 3]))
    np.testing.assert_array_equal(frames, np.stack([*images, images[-1]]))
    assert frames.flags.writeable
    assert video.probe(folder) == 4


def test_only_chosen_images_of_a_folder_are_opened(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    images = write_images(folder, ["img_00001.jpg", "img_00002.jpg"])
    (folder / "img_00003.jpg").write_bytes(b"broken")
    np.testing.assert_array_equal(video.read_frames(folder, lambda num_frames: np.array([1, 0]))[0], images[1])
    with pytest.raises(UserError, match="img_00003"):
        read_all(folder)


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 60), 77, dtype=np.uint8)).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_all(tmp_path), np.full((1, 40, 60, 3), 77))


def test_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    for number, width in enumerate((40, 50)):
        Image.new("RGB", (width, 30)).save(tmp_path / f"{number}.jpg")
    with pytest.raises(UserError, match=r"differ in size \(40 x 30 and 50 x 30 pixels\)"):
        read_all(tmp_path)


@pytest.mark.parametrize("read", READERS)
def test_an_empty_folder_is_reported(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(UserError, match="no supported image"):
        read(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real clips is not beside the repository")
def test_real_clips_are_read_equally(decord_uses: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    clips = sorted((REAL / "clips").iterdir())
    by_decord = [video.read_frames(clip, choose_random) for clip in clips]
    assert True in decord_uses
    monkeypatch.setattr(video, "_decord", lambda: None)
    for clip, frames in zip(clips, by_decord, strict=True):
        assert np.abs(video.read_frames(clip, choose_random).astype(int) - frames).mean() < 0.1, clip.name
        assert video.probe(clip, enough=1000) == len(read_all(clip))


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real clips is not beside the repository")
def test_real_frame_folders_are_read() -> None:
    folders = sorted((REAL / "ssv2small" / "frames" / "val").glob("*/*"))[:5]
    assert folders
    for folder in folders:
        assert video.read_frames(folder, choose_spread).shape == (8, 256, 256, 3)
