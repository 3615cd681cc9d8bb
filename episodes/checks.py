"""Checks every video of a run once, before it starts."""

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from episodes.decoding import probe
from episodes.images import note_summary, sequence_note
from episodes.splits import MAX_PROBLEMS_SHOWN, SplitIndex
from utils.errors import UserError, first_of
from utils.files import write_atomically
from utils.jobs import progress

logger = logging.getLogger(__name__)

MAX_LISTED = 1000  # folders of frames that are listed if the videos are not checked


def unreadable_videos(
    indexes: Sequence[SplitIndex], clip_length: int, threads: int, record: Path | None = None
) -> list[str]:
    """Opens all videos of the given splits and logs those that are shorter than a clip.

    Args:
        indexes: the splits that the run will read.
        clip_length: T, frames in a clip; shorter videos repeat their last frame.
        threads: files opened at a time, at least one.
        record: a file with the log lines of an earlier check that found these videos readable; if it exists, no video
            is opened. None: nothing is recorded.

    Returns:
        one message for each unreadable video.
    """
    lines = _saved_lines(record) if record else None
    if lines is None:
        problems, lines = _check([index.path(v) for index in indexes for v in range(len(index))], clip_length, threads)
        if problems:
            return first_of(problems, MAX_PROBLEMS_SHOWN, " unreadable videos")
        if record:
            with contextlib.suppress(OSError):  # the next start checks again
                write_atomically(record, json.dumps(lines).encode())
    for line in lines:
        logger.info("%s", line)
    return []


def _saved_lines(record: Path) -> list[str] | None:
    """Returns the log lines of an earlier check; None if there was none."""
    try:
        return [str(line) for line in json.loads(record.read_bytes())]
    except (OSError, ValueError, TypeError):
        return None


def _check(paths: Sequence[Path], clip_length: int, threads: int) -> tuple[list[str], list[str]]:
    """Opens videos; returns a message for each unreadable one, and log lines about the others."""
    problems: list[str] = []
    short: list[Path] = []
    notes: Counter[str] = Counter()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        open_all = pool.map if threads > 1 else map  # `map`: this thread, whose helper process also decodes later
        results = progress(open_all(partial(_open, clip_length), paths), len(paths), "check videos", unit="video")
        try:
            for path, (frames, problem, note) in zip(paths, results, strict=True):
                notes[note] += 1
                if problem:
                    problems.append(problem)
                elif frames < clip_length:
                    short.append(path)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # on Ctrl-C, do not wait for the remaining videos
            raise
    lines = note_summary(notes)
    if short:
        lines.append(
            f"{len(short)} of {len(paths)} videos have fewer than {clip_length} frames; their last frame is repeated "
            f"(the first: {short[0]})"
        )
    return problems, lines


def report_sequences(indexes: Sequence[SplitIndex]) -> None:
    """Logs which image sequence is used for videos whose folders contain several; opens no image.

    Of many folders, only an evenly spaced sample is listed.
    """
    paths = [index.path(video) for index in indexes for video in range(len(index))]
    folders = [path for path in paths if path.is_dir()]
    sample = np.unique(np.linspace(0, len(folders) - 1, min(len(folders), MAX_LISTED)).round().astype(int))
    notes: Counter[str] = Counter()
    for position in sample:
        with contextlib.suppress(UserError):  # reading its frames reports it
            notes[sequence_note(folders[position])] += 1
    for line in note_summary(notes):
        logger.info("%s (names of %d of %d folders compared)", line, len(sample), len(folders))


def _open(clip_length: int, path: Path) -> tuple[int, str | None, str]:
    """Returns the number of frames as `probe` does, the error message or None, and the `sequence_note`."""
    try:
        return probe(path, enough=clip_length), None, sequence_note(path)
    except UserError as error:
        return 0, str(error), ""
