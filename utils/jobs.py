"""Long jobs: as many processes as there are cores, and progress that a person can follow."""

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
    """Returns how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_main_process() -> bool:
    """Returns whether this process, alone or as the first of several, is the one that speaks to the user."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def children_block(*numbers: int) -> Iterator[None]:
    """Has processes that start within this block ignore signals from their first moment on, and this one meanwhile.

    Ctrl-C reaches every process of the terminal; only the parent reacts to it, with one message.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def progress(
    items: Iterable[Item] | None, total: int, doing: str, unit: str = "episode", in_lines: bool = False
) -> "tqdm[Item]":
    """Returns the items with a progress bar, which only a terminal shows; of several processes the main one does.

    Args:
        items: what is done one after the other; without, the `update` of the bar counts.
        total: how many there are.
        doing: the first word of the bar or line ("rendering"); unit: of an item ("clip").
        in_lines: where a bar cannot be drawn, print a line now and then.
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
    """A bar for log files: it prints a line where a bar would be drawn again, the last one with all items."""

    printed = 0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Prints the number of items if it has grown, unless the bar is to be cleared."""
        if self.n > self.printed and msg is None:
            more = f", {self.postfix}" if self.postfix else ""
            print(f"{self.desc}: {self.n:,} of {self.total:,} {self.unit}s{more}", file=sys.stderr, flush=True)
            self.printed = self.n

    def close(self) -> None:
        """Prints the last line."""
        if not self.disable:
            self.display()
        super().close()
