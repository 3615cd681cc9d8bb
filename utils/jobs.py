"""Long jobs on files: whole files or none, as many processes as there are cores, progress that a person can follow."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0

Step = TypeVar("Step")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, either all of it or nothing is found under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write_bytes(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file. Raises OSError that names it; the system's own names none when the disk is full."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def usable_cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches every process of the terminal; only the parent may react to it, with one message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def watch(steps: Iterator[Step], total: int, doing: str, unit: str) -> Iterator[Step]:
    """Pass the steps on and show how far they are: a bar on a terminal, else a line now and then.

    Args:
        steps: what is done one after the other; total: how many there are.
        doing: the first word of the bar or line ("rendering"); unit: of a step ("clip").
    """
    if sys.stderr.isatty():
        yield from tqdm(steps, total=total, desc=doing, unit=unit, dynamic_ncols=True)
        return
    last_line = time.monotonic()
    for done, step in enumerate(steps, start=1):
        yield step
        if time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            print(f"{doing}: {done} of {total} {unit}s", file=sys.stderr, flush=True)
