"""Helpers for long jobs: number of processes, signals and progress bars."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0

Item = TypeVar("Item")


def usable_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_main_process() -> bool:
    """Returns whether this process is the one that prints messages: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def block_signals(*numbers: int) -> Iterator[None]:
    """Blocks signals in this process until the context ends, and in all processes that start within it.

    Ctrl-C reaches every process of the terminal; only the parent should react to it, with one message.

    Args:
        numbers: the signals.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def progress(
    items: Iterable[Item] | None, total: int, doing: str, unit: str = "episode", in_lines: bool = False
) -> "tqdm[Item]":
    """Returns the items with a progress bar, which only the main process shows, and only on a terminal.

    Args:
        items: the items to count; None to count with the bar's `update`.
        total: number of items.
        doing: the beginning of the bar or line ("rendering").
        unit: name of an item ("clip").
        in_lines: without a terminal, print a line every few seconds.
    """
    is_bar = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    shown = tqdm if is_bar else _Lines
    seconds = {} if is_bar else {"mininterval": SECONDS_BETWEEN_LINES, "maxinterval": SECONDS_BETWEEN_LINES}
    options = {
        "disable": not (is_main_process() and (is_bar or in_lines)),
        "dynamic_ncols": True,
        "leave": is_bar,
        **seconds,
    }
    return shown(items, total=total, desc=doing, unit=unit, **options)


class _Lines(tqdm):
    """A bar for log files: it prints a line whenever a bar would be redrawn, and one when it closes."""

    printed = 0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Prints the number of items if it has grown, unless the bar is being cleared."""
        if self.n > self.printed and msg is None:
            more = f", {self.postfix}" if self.postfix else ""
            print(f"{self.desc}: {self.n:,} of {self.total:,} {self.unit}s{more}", file=sys.stderr, flush=True)
            self.printed = self.n

    def close(self) -> None:
        """Prints the last line."""
        if not self.disable:
            self.display()
        super().close()
