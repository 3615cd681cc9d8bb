"""Temporal transforms, which choose the frames of a clip.

Every function returns int64 [T], indices of frames of one video in time order, never decreasing. If a video has too few
frames, all are used and the last one is repeated. The functions are pure: random ones take a generator, so that a clip
can be repeated exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from utils.errors import UserError

FrameChooser: TypeAlias = Callable[[int], np.ndarray]  # number of frames of a video -> wanted indices, int64 [T]
Sampling: TypeAlias = Literal["linspace", "segments"]

MAXIMUM_JITTER = 5  # frames; how far the published rule moves the first and the last frame of a training clip


def spread_indices(num_frames: int, length: int) -> np.ndarray:
    """Spreads `length` frames evenly over the video: the published rule for testing.

    The first and last frame of the video are left out, unless it is too short for that.

    Returns:
        int64 [length].

    Raises:
        ValueError: `num_frames` or `length` is below 1.
    """
    _check(num_frames, length)
    if num_frames <= length:
        return _repeat_last(num_frames, length)
    return _evenly_spaced(1, num_frames - 2, num_frames, length)


def jittered_indices(num_frames: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Spreads `length` frames evenly between a random start and a random end: the published rule for training.

    Start and end move by at most 5 frames, and by at most half of the frames that the clip does not need.

    Returns:
        int64 [length].

    Raises:
        ValueError: `num_frames` or `length` is below 1.
    """
    _check(num_frames, length)
    if num_frames <= length:
        return _repeat_last(num_frames, length)
    pad = min(MAXIMUM_JITTER, (num_frames - length) // 2)
    start, end = 0, num_frames - 1
    if pad >= 1:
        start = int(rng.integers(0, pad, endpoint=True))
        end = int(rng.integers(num_frames - 1 - pad, num_frames - 1, endpoint=True))
    return _evenly_spaced(start, end, num_frames, length)


def segment_indices(num_frames: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts the video into `length` segments of equal size (to within one frame), and draws one frame in each.

    Segment s has the frames from s * num_frames // length to (s + 1) * num_frames // length - 1.

    Returns:
        int64 [length].

    Raises:
        ValueError: `num_frames` or `length` is below 1.
    """
    _check(num_frames, length)
    if num_frames <= length:
        return _repeat_last(num_frames, length)
    edges = np.arange(length + 1, dtype=np.int64) * num_frames // length  # [length + 1]
    return rng.integers(edges[:-1], edges[1:], dtype=np.int64)


@dataclass(frozen=True)
class FrameChoice:
    """A choice of the frames of a clip; plain data, so that it can be sent to another process.

    Attributes:
        length: frames in a clip, T.
        sampling: how a training clip is drawn, "linspace" (the jittered spread) or "segments".
        rng: generator of a training clip; None, for testing: an even spread, the same for both samplings.

    Raises:
        UserError: `sampling` is neither of the two names.
        ValueError: `length` is below 1.
    """

    length: int
    sampling: Sampling
    rng: np.random.Generator | None

    def __post_init__(self) -> None:
        if self.sampling not in ("linspace", "segments"):
            raise UserError(f"Frame sampling must be 'linspace' or 'segments', found {self.sampling!r}.")
        _check(1, self.length)

    def __call__(self, num_frames: int) -> np.ndarray:
        """Returns the indices of the frames of a video with `num_frames` frames: int64 [length]."""
        if self.rng is None:
            return spread_indices(num_frames, self.length)
        draw = jittered_indices if self.sampling == "linspace" else segment_indices
        return draw(num_frames, self.length, self.rng)


def _check(num_frames: int, length: int) -> None:
    """Raises ValueError unless `num_frames` and `length` are at least 1."""
    if num_frames < 1:
        raise ValueError(f"a video needs at least 1 frame to choose from, got {num_frames}")
    if length < 1:
        raise ValueError(f"a clip needs at least 1 frame, got {length}")


def _repeat_last(num_frames: int, length: int) -> np.ndarray:
    """Returns 0, 1, ..., num_frames - 1, and then the last index again: int64 [length]."""
    return np.minimum(np.arange(length, dtype=np.int64), num_frames - 1)


def _evenly_spaced(start: int, end: int, num_frames: int, length: int) -> np.ndarray:
    """Returns int64 [length] from `start` to `end`, or over the whole video if these are too close together."""
    # The released rule compares the distance, not the number of frames, so it gives up one frame early; kept here.
    if end - start < length:
        start, end = 0, num_frames - 1
    return np.linspace(start, end, length).astype(np.int64)
