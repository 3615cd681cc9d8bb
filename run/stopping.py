"""Ending a run on Ctrl-C (SIGINT), and on SIGTERM and SIGUSR1, which schedulers send before they take a machine away.

Within the training loop a signal only leaves a note: the loop asks for it after each step, when all is whole, and
saves. Anywhere else there is nothing to save, and the signal ends the run as an exception. A second signal ends the
process at once, wherever it is.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils import distributed
from utils.errors import StopRequested

INTERRUPTED_EXIT = 130  # what shells expect after Ctrl-C: a script or loop around the run ends too
STOPPED_EXIT = 75  # what sysexits.h calls a temporary failure: start the same command again, with --resume
EXIT_CODES = {signal.SIGINT: INTERRUPTED_EXIT, signal.SIGTERM: STOPPED_EXIT, signal.SIGUSR1: STOPPED_EXIT}

# A launcher passes on what it received, while a scheduler may have sent it to all processes: that is one request.
SAME_REQUEST_SECONDS = 2.0


class _Request:
    """What this process knows about its end: the first signal, and whether it is inside the training loop."""

    def __init__(self) -> None:
        self.name = ""
        self.exit_code = STOPPED_EXIT  # also if the signal came to another process
        self.time = 0.0
        self.is_deferred = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.name and not self._is_repeated(number):
            os._exit(128 + number)
        if self.name:
            return
        self.name, self.time = signal.Signals(number).name, time.monotonic()
        self.exit_code = EXIT_CODES[signal.Signals(number)]
        if not self.is_deferred:
            raise StopRequested(f"stopped by {self.name}; nothing was lost", self.exit_code)
        with contextlib.suppress(OSError):  # not through sys.stderr, which this may have interrupted in a write
            os.write(2, f"\n{self.name}: saving after this step; a second one ends at once\n".encode())

    def _is_repeated(self, number: int) -> bool:
        """Whether a signal is the first request again. Ctrl-C of a person is not, where no launcher repeats it."""
        by_person = number == signal.SIGINT and distributed.world_size() == 1
        return not by_person and time.monotonic() - self.time <= SAME_REQUEST_SECONDS


_request = _Request()


@contextmanager
def signals_handled() -> Iterator[None]:
    """Within this block the signals raise StopRequested; afterwards they do what they did before."""
    global _request
    _request = _Request()
    before = {number: signal.signal(number, _request.receive) for number in EXIT_CODES}
    try:
        yield
    finally:
        _request = _Request()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Within this block a signal waits for the next `check`; all processes run through it together."""
    _request.is_deferred = True
    try:
        yield
        check()
    finally:
        _request.is_deferred = False


def is_requested() -> bool:
    """Whether a deferred signal has come to any process; all processes call this together."""
    return _request.is_deferred and distributed.any_process(bool(_request.name))


def check() -> None:
    """Raises StopRequested if a deferred signal has come to any process; all processes call this together."""
    if is_requested():
        raise request("")


def request(rest: str) -> StopRequested:
    """Returns the exception that ends the run, with a message that names the signal and continues with `rest`."""
    return StopRequested(f"stopped by {_request.name or 'a signal to another process'}{rest}", _request.exit_code)
