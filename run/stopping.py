"""Ends a run on Ctrl-C (SIGINT), and on SIGTERM and SIGUSR1, which schedulers send before they stop a job.

Within the training loop a signal only sets a flag, which the loop checks after each step; then it saves. Elsewhere
there is nothing to save, and the signal raises an exception. A second signal ends the process at once.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from run.start import SIGNAL_EXITS, STOPPED_EXIT
from utils import distributed
from utils.errors import StopRequested

# A launcher may forward a signal that the scheduler has also sent to every process. Both count as one request.
SAME_REQUEST_SECONDS = 2.0


class _Flag:
    """The first signal received, and whether it waits until the training loop checks it."""

    name = ""
    exit_code = STOPPED_EXIT  # set even if another process received the signal
    time = 0.0
    is_deferred = False


_flag = _Flag()


@contextmanager
def signals_handled() -> Iterator[None]:
    """Raises StopRequested for signals within this block; afterwards the earlier handlers are restored."""
    global _flag
    before = {number: signal.signal(number, _receive) for number in SIGNAL_EXITS}
    try:
        yield
    finally:
        _flag = _Flag()
        for number, handler in before.items():
            signal.signal(number, handler)


def _receive(number: int, frame: FrameType | None) -> None:
    """Sets the flag, or raises StopRequested outside the training loop; a second request ends the process."""
    if _flag.name:
        # Without a launcher that repeats signals, another Ctrl-C counts as a second request.
        by_person = number == signal.SIGINT and distributed.world_size() == 1
        if by_person or time.monotonic() - _flag.time > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
        return
    _flag.name, _flag.time = signal.Signals(number).name, time.monotonic()
    _flag.exit_code = SIGNAL_EXITS[signal.Signals(number)]
    if not _flag.is_deferred:
        raise StopRequested(f"stopped by {_flag.name}; no progress was lost", _flag.exit_code)
    with contextlib.suppress(OSError):  # os.write, since the signal may have interrupted a write to sys.stderr
        os.write(2, f"\n{_flag.name}: saving after this step; a second signal ends the run at once\n".encode())


@contextmanager
def deferred(save: Callable[[], str]) -> Iterator[None]:
    """Defers signals within this block to the next `check`; all processes enter the block together.

    Args:
        save: called if a signal ends the block; returns the end of the message.
    """
    _flag.is_deferred = True
    try:
        yield
        check()
    except StopRequested as stop:
        raise StopRequested(f"{stop} {save()}", stop.exit_code) from None
    finally:
        _flag.is_deferred = False


def is_requested() -> bool:
    """Returns whether any process received a deferred signal; all processes call this together."""
    return _flag.is_deferred and distributed.any_process(bool(_flag.name))


def check() -> None:
    """Raises StopRequested if any process received a deferred signal; all processes call this together."""
    if is_requested():
        raise request()


def request() -> StopRequested:
    """Returns the exception that ends the run."""
    return StopRequested(f"stopped by {_flag.name or 'a signal to another process'}", _flag.exit_code)
