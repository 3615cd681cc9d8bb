"""Ending a run on SIGTERM and SIGUSR1, as schedulers send them before they take a machine away.

Within the training loop a signal only leaves a note: the loop asks for it after each step, when all is whole, and
saves. Anywhere else there is nothing to save, and the signal ends the run as an exception. A second signal ends the
process at once, wherever it is.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# A launcher passes on what it received, while a scheduler may have sent it to all processes: that is one request.
SAME_REQUEST_SECONDS = 2.0


class StopRequested(BaseException):
    """The run was asked to end; no Exception, since no code that handles errors may take it for one."""


class _Request:
    """What this process knows about its end: the first signal, and whether it is inside the training loop."""

    def __init__(self) -> None:
        self.name = ""
        self.time = 0.0
        self.is_deferred = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.name and time.monotonic() - self.time > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
        if self.name:
            return
        self.name, self.time = signal.Signals(number).name, time.monotonic()
        if not self.is_deferred:
            raise StopRequested(f"stopped by {self.name}; nothing was lost")


_request = _Request()


@contextmanager
def signals_handled() -> Iterator[None]:
    """Within this block SIGTERM and SIGUSR1 raise StopRequested; afterwards they do what they did before."""
    global _request
    _request = _Request()
    before = {number: signal.signal(number, _request.receive) for number in SIGNALS}
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
        raise StopRequested(reason())


def reason() -> str:
    """The beginning of the sentence that a run ends with."""
    return f"stopped by {_request.name or 'a signal to another process'}"
