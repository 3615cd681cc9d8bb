"""Opening every video of a run once, before it starts."""

import contextlib
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from episodes.decoding import probe
from episodes.images import notes_in_short, sequence_note
from episodes.splits import MOST_PROBLEMS_SHOWN, SplitIndex
from utils.errors import UserError, first_of
from utils.jobs import progress

logger = logging.getLogger(__name__)

MOST_LISTED = 1000  # folders of frames that are listed when the videos are not to be checked


def unreadable_videos(indexes: Sequence[SplitIndex], clip_length: int, threads: int) -> list[str]:
    """Opens all videos of the given splits and logs those that are shorter than a clip.

    Args:
        indexes: the splits that the run will read.
        clip_length: T, frames in a clip; a shorter video is used with its last frame repeated.
        threads: files opened at a time, at least one.

    Returns:
        one message for each unreadable video.
    """
    paths = [index.path(video) for index in indexes for video in range(len(index))]
    problems: list[str] = []
    short: list[Path] = []
    notes: Counter[str] = Counter()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        open_all = pool.map if threads > 1 else map  # one thread: this one, whose helper process decodes later too
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
    if problems:
        return first_of(problems, MOST_PROBLEMS_SHOWN, " videos that cannot be read")
    for line in notes_in_short(notes):
        logger.info("%s", line)
    if short:
        logger.info(
            "%d of %d videos have fewer than %d frames; their last frame is repeated (the first: %s)",
            len(short), len(paths), clip_length, short[0],
        )  # fmt: skip
    return []


def report_sequences(indexes: Sequence[SplitIndex]) -> None:
    """Logs which image sequence is used for videos whose folders hold several; opens no image.

    With many folders, an evenly spread sample is listed.
    """
    paths = [index.path(video) for index in indexes for video in range(len(index))]
    folders = [path for path in paths if path.is_dir()]
    spread = np.unique(np.linspace(0, len(folders) - 1, min(len(folders), MOST_LISTED)).round().astype(int))
    notes: Counter[str] = Counter()
    for position in spread:
        with contextlib.suppress(UserError):  # reading its frames reports it
            notes[sequence_note(folders[position])] += 1
    for line in notes_in_short(notes):
        logger.info("of %d of %d folders, not opened: %s", len(spread), len(folders), line)


def _open(clip_length: int, path: Path) -> tuple[int, str | None, str]:
    """Returns the number of frames (at most `clip_length` without a header), an error or None, and `sequence_note`."""
    try:
        return probe(path, enough=clip_length), None, sequence_note(path)
    except UserError as error:
        return 0, str(error), ""
