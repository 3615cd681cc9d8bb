"""One video in each form that users have - file, folder of JPEGs, packed store: the same frames from each reader."""

import logging
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import av.filter
import numpy as np
import pytest
from PIL import Image

from episodes import video
from episodes.checks import unreadable_videos
from episodes.packed import write_packed
from episodes.splits import load_splits
from episodes.video import read_frames
from tests.helpers.tiny_dataset import TinyDataset, tiny_class_names, tiny_video_names, write_split_files
from tests.helpers.videos import CHOICES, NUM_FRAMES, OTHERS, choose_spread, paint, read_all, read_number, render
from videotransforms.volume_transforms import FrameChooser

# Longest pause first: uneven, as from a screen recorder or a phone, in thousandths of a second.
PAUSES = [500, 1, 33, 400, 17, 40, 40, 250, 5, 90]


def render_uneven(path: Path, encoder: str, options: dict[str, str]) -> Path:
    """Writes a video in which frame i shows i and frames have different durations."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 72, 96, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        time = 0
        for number in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(paint(number, 72, 96), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            time += PAUSES[number % len(PAUSES)]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


UNEVEN = {
    "uneven.mp4": ("libx264", {"bf": "3", "g": "12"}),
    "uneven.mkv": ("libx264", {"bf": "2", "g": "10"}),
    "uneven.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "12"}),
}


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("name", UNEVEN)
def test_frames_with_uneven_durations_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decord_uses: list[bool], name: str, choose: FrameChooser
) -> None:
    path = render_uneven(tmp_path / name, *UNEVEN[name])
    with av.open(str(path)) as container:
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert len({b - a for a, b in pairwise(times)}) > 3
    by_decord = read_frames(path, choose)
    monkeypatch.setattr(video, "_decord", lambda: None)
    by_pyav = read_frames(path, choose)
    assert decord_uses == [True, False]
    for frames in (by_decord, by_pyav):
        assert [read_number(frame) for frame in frames] == choose(NUM_FRAMES).tolist()
    assert np.abs(by_decord.astype(int) - by_pyav).mean() < 0.1  # of 255


def extract(path: Path, folder: Path) -> list[Path]:
    """Writes all frames of a video as JPEG files."""
    folder.mkdir(parents=True)
    files = []
    for number, frame in enumerate(read_all(path), start=1):
        files.append(folder / f"{number:05d}.jpg")
        Image.fromarray(frame).save(files[-1], quality=95, subsampling=0)
    return files


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("name", ["h264.mp4", "h264_odd.mov", "vp9.webm", *OTHERS])
def test_file_folder_and_packed_store_give_the_same_frames(
    videos: Path, tmp_path: Path, name: str, choose: FrameChooser
) -> None:
    files = extract(videos / name, tmp_path / "class" / "clip")
    write_packed(tmp_path / "train.sqlite", [("class/clip", files)])
    from_file = read_frames(videos / name, choose)
    from_folder = read_frames(tmp_path / "class" / "clip", choose)
    from_store = read_frames(tmp_path / "train.sqlite" / "class" / "clip", choose)
    np.testing.assert_array_equal(from_store, from_folder)
    assert [read_number(frame) for frame in from_store] == choose(NUM_FRAMES).tolist()
    assert np.abs(from_store.astype(int) - from_file).mean() < 3  # of 255: the JPEG loss at this quality


@pytest.mark.parametrize("name", ["short.webm", "short.mkv"])
def test_a_short_video_without_a_header_count_is_read_and_reported(
    tiny_dataset: TinyDataset, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    short = render(tmp_path / name, "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, (72, 96), num_frames=5)
    with av.open(str(short)) as container:
        assert container.streams.video[0].frames == 0
    assert [read_number(frame) for frame in read_frames(short, choose_spread)] == [0, 1, 2, 3, 4, 4, 4, 4]
    write_split_files(tmp_path / "splits", listed=False)
    for class_name in tiny_class_names("test"):
        (tmp_path / "videos" / class_name).mkdir(parents=True)
        for video_name in tiny_video_names(class_name):
            (tmp_path / "videos" / class_name / f"{video_name}{short.suffix}").write_bytes(short.read_bytes())
    index = load_splits(tmp_path / "splits", tmp_path / "videos", ["test"])["test"]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="episodes.checks"):
        unreadable_videos([index], 5, 2)
        assert caplog.messages == []
        unreadable_videos([index], 8, 2)
    assert caplog.messages[0].startswith("30 of 30 videos have fewer than 8 frames")


def convert_as_ffmpeg(path: Path) -> np.ndarray:
    """Returns all frames of a video as FFmpeg's own filters convert them: uint8 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        graph = av.filter.Graph()
        graph.link_nodes(
            graph.add_buffer(template=container.streams.video[0]), graph.add("format", "rgb24"), graph.add("buffersink")
        ).configure()
        frames = []
        for frame in container.decode(video=0):
            graph.vpush(frame)
            frames.append(graph.vpull().to_ndarray())
    return np.stack(frames)


@pytest.mark.parametrize(
    ("encoder", "pixels"),
    [("libx264", "yuv420p10le"), ("libx264", "yuv422p10le"), ("ffv1", "yuv411p"), ("ffv1", "gray16le")],
)
def test_pixel_formats_are_converted_as_by_ffmpeg(
    tmp_path: Path, decord_uses: list[bool], encoder: str, pixels: str
) -> None:
    path = tmp_path / "clip.mkv"
    colours = np.random.default_rng(0).integers(0, 256, (6, 9, 12, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=25, options={"g": "2"})
        stream.height, stream.width, stream.pix_fmt = 72, 96, pixels
        for image in colours:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    expected = convert_as_ffmpeg(path)
    assert np.array_equal(read_frames(path, np.arange), expected)
    assert np.array_equal(read_frames(path, np.arange, use_decord=False), expected)
