"""Rendered videos with numbered frames, and how the readers read them."""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from episodes import video
from tests.helpers.shipped import ROOT
from videotransforms.volume_transforms import spread_indices

REAL = ROOT.parent / "shared" / "real"
BITS = 6  # a frame shows its number as that many black or white blocks
NUM_FRAMES = 50
# File name, encoder, its options, (height, width).
EXACT_IN_DECORD = {
    "h264.mp4": ("libx264", {"bf": "3", "g": "12", "sc_threshold": "0"}, (72, 96)),
    "h264_one_group.mp4": ("libx264", {"bf": "3", "g": "250", "sc_threshold": "0"}, (72, 96)),
    "h264_open_groups.mkv": ("libx264", {"x264-params": "open-gop=1:keyint=10:bframes=3"}, (72, 96)),
    "h264_odd.mov": ("libx264", {"g": "12"}, (71, 97)),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "12"}, (72, 96)),
}
OTHERS = {
    "h264.avi": ("libx264", {"bf": "0", "g": "12"}, (72, 96)),
    "mpeg4.avi": ("mpeg4", {"bf": "2", "g": "12"}, (72, 96)),
    "mpeg4.mp4": ("mpeg4", {"bf": "2", "g": "12"}, (72, 96)),
    "mjpeg.avi": ("mjpeg", {}, (71, 97)),
    "mpeg1.mpg": ("mpeg1video", {"bf": "2", "g": "12"}, (72, 96)),
    "mpeg2.mpeg": ("mpeg2video", {"bf": "2", "g": "12"}, (72, 96)),
    "narrow.mp4": ("libx264", {"g": "12"}, (72, 72)),
}
ALL = EXACT_IN_DECORD | OTHERS


def paint(number: int, height: int, width: int) -> np.ndarray:
    """Returns a grey image with the bits of `number` as blocks: uint8 [H, W, 3]."""
    image = np.full((height, width, 3), 110, dtype=np.uint8)
    block = width // BITS
    for bit in range(BITS):
        image[height // 4 : 3 * height // 4, bit * block : (bit + 1) * block] = 235 if (number >> bit) & 1 else 20
    return image


def read_number(image: np.ndarray) -> int:
    """Returns the number that `paint` put into an image uint8 [H, W, 3]."""
    height, width = image.shape[:2]
    block = width // BITS
    rows = slice(height // 4 + 4, 3 * height // 4 - 4)
    middles = [image[rows, bit * block + block // 4 : (bit + 1) * block - block // 4] for bit in range(BITS)]
    return sum(1 << bit for bit, middle in enumerate(middles) if middle.mean() > 128)


def render(
    path: Path, encoder: str, options: dict[str, str], size: tuple[int, int], num_frames: int = NUM_FRAMES
) -> Path:
    """Writes a video in which frame i shows i."""
    height, width = size
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(encoder, rate=25, options=options)
        stream.height, stream.width = size
        pixels = "yuv420p" if height % 2 == 0 else "yuv444p"
        stream.pix_fmt = {"mjpeg": "yuvj420p"}.get(encoder, pixels)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(paint(number, height, width), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def render_all(folder: Path) -> Path:
    """Writes one video per kind into a folder."""
    for name, (encoder, options, size) in ALL.items():
        render(folder / name, encoder, options, size)
    return folder


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with one video per kind."""
    return render_all(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def decord_uses(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Reads with decord wherever it is exact; returns a list that gets True for each video read with it."""
    pytest.importorskip("decord")
    uses: list[bool] = []
    read = video._read_with_decord

    def read_and_record(path: Path, count: int, indices: list[int]) -> np.ndarray | None:
        frames = read(path, count, indices)
        uses.append(frames is not None)
        return frames

    monkeypatch.setattr(video, "_decord_is_faster", lambda packets, indices: True)
    monkeypatch.setattr(video, "_read_with_decord", read_and_record)
    return uses


choose_all = np.arange


def read_all(path: Path) -> np.ndarray:
    return video.read_frames(path, choose_all)


def choose_spread(num_frames: int) -> np.ndarray:
    return spread_indices(num_frames, 8)


def choose_random(num_frames: int) -> np.ndarray:
    return np.random.default_rng(num_frames).integers(0, num_frames, 10)


CHOICES = [choose_all, choose_spread, choose_random]


def numbers(path: Path, choose: Callable[[int], np.ndarray]) -> list[int]:
    return [read_number(frame) for frame in video.read_frames(path, choose)]
