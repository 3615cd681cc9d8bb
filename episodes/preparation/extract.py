"""Extracts one video into a folder of JPEG frames, completely or not at all.

The folder is written under a temporary name and renamed when it is complete. The comment of each JPEG file contains the
number of its frame and of all frames, so that a resumed preparation needs no other record.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from episodes.decoding import call, read_frames
from episodes.images import list_images
from episodes.preparation.cut_off import share_present
from episodes.preparation.settings import FrameSettings
from utils.errors import UserError
from utils.files import write_bytes
from videotransforms.volume_transforms import spread_indices

# The default intra matrix of MPEG-1 (ISO/IEC 11172-2). ffmpeg's JPEG encoder scales it by its quality q: each entry
# times q, divided by 8. Common frame sets have this table for all three channels, so the same q means the same quality.
INTRA_MATRIX = (
    8, 16, 19, 22, 26, 27, 29, 34, 16, 16, 22, 24, 27, 29, 34, 37, 19, 22, 26, 27, 29, 34, 34, 38, 22, 22, 26, 27,
    29, 34, 37, 40, 22, 26, 27, 29, 32, 35, 40, 48, 26, 27, 29, 32, 35, 40, 48, 58, 26, 27, 29, 34, 38, 46, 56, 69,
    27, 29, 35, 38, 46, 56, 69, 83,
)  # fmt: skip
BYTES_AT_A_TIME = 256 * 2**20  # of decoded frames; a longer video is decoded in several passes
FIRST_FRAMES = 8  # read before the size of a frame is known
LARGEST_SIDE = 65_500  # pixels, of what libjpeg writes
COMMENT = re.compile(rb"frame (\d+) of (\d+); (\d+) kept; source of (\d+) bytes(?:, cut off at (\d+) %)?")
WHOLE = 0.9  # of the announced frames; headers of intact files are slightly off too


@dataclass(frozen=True)
class Task:
    """One video to extract.

    Attributes:
        name: `class/video`.
        source: the raw video, a file or a folder of images.
        target: the folder of frames.
        partial: the folder for incomplete results.
        settings: settings of the frames.
    """

    name: str
    source: Path
    target: Path
    partial: Path
    settings: FrameSettings


@dataclass(frozen=True)
class Record:
    """The record of a folder of frames.

    Attributes:
        frames: number of frames of the raw video.
        kept: number of stored frames.
        source_bytes: size of the raw video.
        percent: its length in percent of that in its header; 100 unless it is cut off.
    """

    frames: int
    kept: int
    source_bytes: int
    percent: int = 100


def extract(task: Task) -> str:
    """Writes the folder of frames of one video.

    Returns:
        the problem of the video in one sentence, or "" if its folder was written.

    Raises:
        OSError: the folder cannot be written.
    """
    task.partial.mkdir(parents=True, exist_ok=True)
    folder = task.partial / f"{threading.get_ident()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        source = f"source of {source_size(task.source)} bytes{_cut_off_record(task.source)}"
        for number, (what, picture) in enumerate(_pictures(task.source, task.settings), start=1):
            content = encode(picture, task.settings, f"{what}; {source}".encode())
            write_bytes(folder / f"{number:08d}.jpg", content)
    except UserError as error:
        shutil.rmtree(folder)
        return _without_folder(str(error), task.source)
    task.target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(folder, task.target)
    return ""


def _cut_off_record(source: Path) -> str:
    """Returns the part of the comment on a video that is cut off; "" for a complete one."""
    share = _share_present(source)
    return "" if share >= WHOLE else f", cut off at {100 * share:.0f} %"


def _share_present(source: Path) -> float:
    """Returns `share_present` of a raw video, in [0, 1]; a folder of images is complete."""
    return call(share_present, source) if source.is_file() else 1.0


def source_size(source: Path) -> int:
    """Returns the bytes of a raw video, a file or a folder of images; raises UserError if it is unreadable."""
    try:
        files = list_images(source) if source.is_dir() else [source]
        return sum(file.stat().st_size for file in files)
    except OSError as error:
        raise UserError(f"Cannot read {source}: {error.strerror}.") from error


def record_of(folder: Path) -> Record | None:
    """Returns the record of a folder of frames; None if it is missing, incomplete or not written by this command."""
    try:
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        with Image.open(folder / f"{1:08d}.jpg") as image:
            match = COMMENT.fullmatch(image.info.get("comment", b""))
    except (OSError, SyntaxError):
        return None
    if match is None:
        return None
    _, frames, kept, source_bytes, percent = map(int, match.groups(default=b"100"))
    expected = {f"{number:08d}.jpg" for number in range(1, kept + 1)}
    # A power failure may leave an empty file.
    if set(sizes) != expected or min(sizes.values()) == 0:
        return None
    return Record(frames, kept, source_bytes, percent)


def kept_indices(num_frames: int, settings: FrameSettings) -> np.ndarray:
    """Returns the indices of the stored frames of a video: int64 [K], rising; each frame at most once."""
    if settings.frames is None:
        return np.arange(num_frames, dtype=np.int64)
    return np.unique(spread_indices(num_frames, settings.frames))


def encode(picture: np.ndarray, settings: FrameSettings, comment: bytes) -> bytes:
    """Resizes one frame, uint8 [H, W, 3], and encodes it as JPEG; the same input gives the same bytes.

    Raises:
        UserError: the resized frame is too long for a JPEG file.
    """
    image = Image.fromarray(picture)
    size = _stored_size(image.size, settings)
    if max(size) > LARGEST_SIDE:
        raise UserError(
            f"Its frames of {image.width} x {image.height} pixels would be stored as {size[0]} x {size[1]}, and a JPEG "
            f"file has at most {LARGEST_SIDE:,} on a side: crop the video, or store it with --square."
        )
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)  # antialiased, like the resizing of clips
    table = [8, *(max(1, entry * settings.quality // 8) for entry in INTRA_MATRIX[1:])]
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", qtables=[table], subsampling="4:2:0", optimize=True, comment=comment)
    return buffer.getvalue()


def _stored_size(size: tuple[int, int], settings: FrameSettings) -> tuple[int, int]:
    """Returns (width, height) in pixels after resizing, rounded down as torchvision does."""
    if settings.shape == "square":
        return settings.size, settings.size
    width, height = size
    if width <= height:
        return settings.size, int(settings.size * height / width)
    return int(settings.size * width / height), settings.size


class _Part:
    """A choice of some of the kept frames of a video, which records the number of all frames."""

    def __init__(self, settings: FrameSettings, first: int, length: int) -> None:
        self.settings, self.first, self.length = settings, first, length
        self.frames = 0  # number of frames of the video
        self.kept = np.empty(0, dtype=np.int64)

    def __call__(self, num_frames: int) -> np.ndarray:
        """Returns the indices of this part: int64 [K]."""
        self.frames, self.kept = num_frames, kept_indices(num_frames, self.settings)
        return self.kept[self.first : self.first + self.length]


def _pictures(source: Path, settings: FrameSettings) -> Iterator[tuple[str, np.ndarray]]:
    """Yields a description of each kept frame ("frame 17 of 64; 8 kept") and the frame, uint8 [H, W, 3]."""
    first, length = 0, FIRST_FRAMES
    while True:
        pictures, part = read_frames(source, _Part(settings, first, length))
        for index, picture in zip(part.kept[first:], pictures, strict=False):
            yield f"frame {index + 1} of {part.frames}; {len(part.kept)} kept", picture
        first += len(pictures)
        if first >= len(part.kept):
            return
        length = max(FIRST_FRAMES, BYTES_AT_A_TIME // pictures[0].nbytes)


def _without_folder(reason: str, source: Path) -> str:
    """Returns the reason with the video's name instead of its path, so that reports agree between machines."""
    return reason.replace(str(source), source.name)
