"""Reads a long video in windows: one pass over its frames, with only a few in memory at a time.

The helper process of `episodes.decoding` keeps the video open between calls. Each call names its first frame, so that
after a crash a new helper can decode up to it.

Shapes: F frames of a video, T frames of a window.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from episodes import decoding
from episodes.images import list_images
from episodes.video import data_packets, open_video, shown_frames
from episodes.video_files import is_webp_animation
from utils.errors import UserError

FRAMES_PER_READ = 32  # per call; frames pass between processes at full size
DECODED_PER_READ = 256  # frames, so that one call stays far below the time limit
USUAL_RATE = 25.0  # frames per second, for a video without times and rate


def frame_times(path: Path) -> np.ndarray | None:
    """Returns the time of each frame of a video: float64 [F], in seconds from the first; None for images.

    Raises:
        UserError: the video is missing or unreadable.
    """
    if not _is_stream(path):
        return None
    return decoding.call(_frame_times, path)


def frame_count(path: Path) -> int:
    """Returns the number of frames of a video or a folder of images.

    Raises:
        UserError: the video is missing or unreadable.
    """
    if os.path.isdir(path):
        return len(list_images(path))
    times = frame_times(path)
    return decoding.probe(path) if times is None else len(times)


def read_windows(
    path: Path, windows: Sequence[np.ndarray], shrink: Callable[[np.ndarray], np.ndarray]
) -> Iterator[np.ndarray]:
    """Yields the frames of each window in order; if a video ends early, only the windows before its end.

    Args:
        path: a video file, an animation or a folder of images.
        windows: int64 [T] each, the indices of frames in time order; starts and ends never decrease.
        shrink: uint8 [n, H, W, 3] -> uint8 [n, h, w, 3], so that frames kept for a later window are small.

    Yields:
        uint8 [T, h, w, 3].

    Raises:
        UserError: the video is missing or unreadable.
    """
    wanted = np.unique(np.concatenate(windows))
    kept: dict[int, np.ndarray] = {}
    waiting = iter(windows)
    window = next(waiting, None)
    for indices, frames in _read_in_parts(path, wanted):
        kept.update(zip(indices.tolist(), shrink(frames), strict=False))
        while window is not None and int(window[-1]) in kept:
            yield np.stack([kept[index] for index in window.tolist()])
            window = next(waiting, None)
            for index in [index for index in kept if window is None or index < window[0]]:
                del kept[index]


def _read_in_parts(path: Path, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the wanted frames, int64 [W], in groups: their indices and uint8 [n, H, W, 3]."""
    is_stream, first = _is_stream(path), 0
    while len(wanted):
        part = wanted[:FRAMES_PER_READ]
        if is_stream:
            stop = min(int(part[-1]) + 1, first + DECODED_PER_READ)
            part = part[part < stop]
            frames = decoding.call(_next_frames, path, first, stop, part.tolist())
            first = stop
        else:
            frames, _ = decoding.read_frames(path, _FixedIndices(part))
        if len(frames):
            yield part, frames
        if len(frames) < len(part):
            return
        wanted = wanted[len(part) :]


@dataclass(frozen=True)
class _FixedIndices:
    """A frame choice that does not depend on the number of frames; picklable, for the helper process."""

    indices: np.ndarray

    def __call__(self, num_frames: int) -> np.ndarray:
        return self.indices


def _is_stream(path: Path) -> bool:
    return not os.path.isdir(path) and not is_webp_animation(path)


# --- in the helper process --------------------------------------------------------------------------------


def _frame_times(path: Path) -> np.ndarray:
    """Reads the times from the packets, without decoding; returns evenly spaced times if the file has none."""
    with open_video(path) as (container, stream):
        stamps = [
            packet.dts if packet.pts is None else packet.pts
            for packet in data_packets(container, stream)
            if not packet.is_discard
        ]
        if not stamps:
            raise UserError(f"No frame of the video file {path} can be decoded: download or convert it again.")
        known = np.array([stamp for stamp in stamps if stamp is not None], dtype=np.float64)
        if len(known) < len(stamps) or stream.time_base is None or len(np.unique(known)) < len(known):
            return np.arange(len(stamps)) / float(stream.average_rate or stream.guessed_rate or USUAL_RATE)
        known.sort()  # packets come in the order of decoding
        return (known - known[0]) * float(stream.time_base)


_Reading = Iterator[Callable[[], np.ndarray]]
_open: dict[tuple[Path, int], _Reading] = {}  # (video, next index) -> remaining frames; at most one entry


def _next_frames(path: Path, first: int, stop: int, indices: Sequence[int]) -> np.ndarray:
    """Decodes the frames first .. stop - 1; returns those at `indices` that exist, uint8 [n, H, W, 3]."""
    reading, position = _open.pop((path, first), None), first
    _open.clear()
    if reading is None:
        reading, position = shown_frames(path), 0
    wanted, frames = set(indices), []
    while position < stop:
        convert = next(reading, None)
        if convert is None:
            break
        if position in wanted:
            frames.append(convert())
        position += 1
    else:
        _open[path, stop] = reading
    return np.stack(frames) if frames else np.empty((0, 1, 1, 3), dtype=np.uint8)
