"""Finds when which action happens in a long video, by classifying overlapping windows.

Shapes: W windows of a video, T frames of a window, F frames of the video, N classes.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from episodes.streaming import frame_count, frame_times, read_windows
from fsar import CLIPS_PER_BATCH, Classifier, Prediction
from run.lengths import Length
from utils.errors import UserError
from utils.jobs import progress
from videotransforms.volume_transforms import FrameChoice

logger = logging.getLogger(__name__)

ROUNDING = 1e-4  # seconds or frames; times in a file are rounded to its time base


class Segment(NamedTuple):
    """A part of a video with one answer: start and stop in seconds or frames, and the mean probability."""

    start: float
    stop: float
    answer: str
    probability: float


@dataclass(frozen=True)
class Timeline:
    """The answers to the windows of one video.

    starts, stops: float64 [W], in `unit`. prediction: of the W windows.
    """

    unit: Literal["s", "f"]
    starts: np.ndarray
    stops: np.ndarray
    prediction: Prediction

    def edges(self) -> np.ndarray:
        """Returns the boundaries of the parts that the windows represent: float64 [W + 1].

        The boundary between two windows is the middle of their overlap or gap.
        """
        return np.concatenate([self.starts[:1], (self.stops[:-1] + self.starts[1:]) / 2, self.stops[-1:]])

    def segments(self, answers: Sequence[str]) -> list[Segment]:
        """Returns the parts of the video with one answer each, from an answer to each window."""
        best, edges, result = self.prediction.probabilities.amax(dim=-1).tolist(), self.edges().tolist(), []
        for answer, group in groupby(range(len(answers)), key=lambda window: answers[window]):
            windows = list(group)
            mean = sum(best[window] for window in windows) / len(windows)
            result.append(Segment(edges[windows[0]], edges[windows[-1] + 1], answer, mean))
        return result


def classify_windows(classifier: Classifier, path: Path, window: Length, stride: Length) -> Timeline:
    """Classifies the windows of a video in batches; the video is decoded once.

    The frames of a window are chosen like those of a clip. The first window begins at the start of the video, and the
    last one ends at its end. A video that is shorter than a window is a single window.

    Raises:
        UserError: the video is unreadable or has no timestamps for a window in seconds, or the stride is shorter than
            a frame and the video longer than a window.
    """
    times = np.arange(frame_count(path), dtype=np.float64) if window.unit == "f" else frame_times(path)
    if times is None:
        raise UserError(
            f"{path} contains images without times: set --window and --stride in frames, such as 16f and 8f"
        )
    starts, stops, frames = plan(times, window, stride, classifier.choice)
    done: list[Prediction] = []
    with progress(None, len(frames), path.name, unit="window") as bar:
        for batch in _batches(read_windows(path, frames, classifier.shrink)):
            done.append(classifier.predict(batch))
            bar.update(len(batch))
    if not done:
        raise UserError(f"no window of {path} can be decoded: download or convert it again")
    prediction = Prediction.joined(done)
    read = len(prediction.scores)
    if read < len(frames):
        logger.warning("%s ends early: %d of %d windows can be decoded", path, read, len(frames))
    return Timeline(window.unit, starts[:read], stops[:read], prediction)


def plan(
    times: np.ndarray, window: Length, stride: Length, choice: FrameChoice
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Returns the start and stop of the windows, float64 [W] each, and the frames of each window, int64 [T].

    Args:
        times: float64 [F], time of each frame in the unit of the window.
        window, stride: lengths in the same unit.
        choice: chooses T frames.

    Raises:
        UserError: the stride is shorter than a frame, in a video that is longer than a window.
    """
    frame = float(np.median(np.diff(times))) if len(times) > 1 else min(window.amount, 1.0)
    end = float(times[-1]) + frame
    last = max(end - window.amount, 0.0)
    if last > ROUNDING and stride.amount < frame - ROUNDING:
        raise UserError(f"--stride {stride} is shorter than a frame, which lasts {frame:.3g}{window.unit}")
    starts = np.arange(0.0, last + ROUNDING, stride.amount) if last > ROUNDING else np.zeros(1)
    if last - starts[-1] > frame / 2:
        starts = np.append(starts, last)
    stops = np.minimum(starts + window.amount, end)
    first, behind = np.searchsorted(times, starts - ROUNDING), np.searchsorted(times, stops - ROUNDING)
    first = np.where(behind > first, first, np.maximum(first - 1, 0))  # without a new frame, the previous one remains
    behind = np.maximum(behind, first + 1)
    frames = [begin + choice(int(count)) for begin, count in zip(first, behind - first, strict=True)]
    return starts, stops, frames


def _batches(windows: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    for window in windows:
        batch.append(window)
        if len(batch) == CLIPS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
