"""Decoding video files in a helper process, so that a crashing or hanging decoder does not end the run.

Decoders are large C programs; a damaged file can abort one or make it run forever, which Python code in the same
process cannot prevent. Each thread that reads video files therefore has a helper process, sends it one video at a
time, and replaces it when it dies. A video that kills two helpers, the second one without decord, counts as
unreadable. Images and packed stores are decoded in the calling process, since Pillow enforces limits itself.

This uses `subprocess` rather than a process pool because DataLoader workers are daemons, which may not start children
through `multiprocessing`. The frame choice is pickled to the helper and returned in its final state.
"""

import contextlib
import functools
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from episodes import video
from episodes.limits import LARGEST_MEMORY, MAX_READING_SECONDS
from utils.errors import UserError
from utils.jobs import block_signals

REPOSITORY = str(Path(__file__).resolve().parents[1])
HELPER = "import sys; sys.path[0] = {repository!r}; from episodes.decoding import serve; serve({descriptor}, {decord})"
READS_PER_HELPER = 1000  # decord leaks some memory with each video
EXIT_SECONDS = 5.0
MEMORY_EXIT = 3  # exit code of a helper that would need more than LARGEST_MEMORY
# Sent to all processes of a job; the parent process handles them.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

Choice = TypeVar("Choice", bound=Callable[[int], np.ndarray])
Result = TypeVar("Result")


def read_frames(path: Path, choose: Choice) -> tuple[np.ndarray, Choice]:
    """Reads the chosen frames of a video like `video.read_frames`, safe from crashes and hangs.

    Args:
        path: a video file, a folder of images, or `<packed store>/<class>/<video>`.
        choose: maps the number of frames to the wanted indices; it can be pickled.

    Returns:
        uint8 [T, H, W, 3], RGB, and `choose` after the call, since its random generator has advanced.

    Raises:
        UserError: the video is missing or cannot be decoded within the limits.
        IndexError: `choose` returns a frame that does not exist.
    """
    if not os.path.isfile(path):
        return video.read_frames(path, choose), choose
    return _decode(_read_frames, path, choose)


def probe(path: Path, enough: int = 1) -> int:
    """Returns the result of `video.probe`, safe from crashes and hangs."""
    return call(video.probe, path, enough) if os.path.isfile(path) else video.probe(path, enough)


def call(function: Callable[..., Result], path: Path, *arguments: Any) -> Result:
    """Returns function(path, *arguments), computed in the helper process.

    Args:
        function: defined in a module, so that it can be pickled; it opens the video file.
        path: the file.
        arguments: further arguments, which can be pickled.

    Raises:
        UserError: the file crashes the helper or exceeds the time limit. Exceptions of the function pass through.
    """
    return _decode(functools.partial(_without_reader, function), path, *arguments)


# --- in the helper process --------------------------------------------------------------------------------


def _read_frames(use_decord: bool, path: Path, choose: Choice) -> tuple[np.ndarray, Choice]:
    return np.ascontiguousarray(video.read_frames(path, choose, use_decord)), choose


def _without_reader(function: Callable[..., Result], use_decord: bool, path: Path, *arguments: Any) -> Result:
    return function(path, *arguments)


def serve(descriptor: int, use_decord: bool) -> None:
    """Runs the jobs that arrive on a connection until its other end closes; the helper's main function."""
    connection = Connection(descriptor)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also inside a decoder
    with contextlib.suppress(ValueError, OSError):  # there is a lower limit, or the system has no limits
        resource.setrlimit(resource.RLIMIT_AS, (LARGEST_MEMORY, LARGEST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send("ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            content = connection.recv_bytes()
            signal.alarm(MAX_READING_SECONDS)
            answer = _answer(content, use_decord)
            signal.alarm(0)
            connection.send(answer)


def _answer(content: bytes, use_decord: bool) -> Any:
    """Returns the result of a pickled job, or the exception that it raises."""
    try:
        job, path, arguments = pickle.loads(content)
        return job(use_decord, path, *arguments)
    except MemoryError:
        os._exit(MEMORY_EXIT)
    except (UserError, IndexError) as error:
        return error
    except Exception:
        return RuntimeError(traceback.format_exc())


# --- in the process that reads ----------------------------------------------------------------------------


class _HelperDiedError(Exception):
    """The helper ended during a job; the message completes a sentence that starts with the video."""


class _Helper:
    """A helper process and the connection to it."""

    def __init__(self, use_decord: bool = True) -> None:
        self.connection, helper_end = Pipe()
        code = HELPER.format(repository=REPOSITORY, descriptor=helper_end.fileno(), decord=use_decord)
        with block_signals(*IGNORED_SIGNALS):
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[helper_end.fileno()], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        helper_end.close()
        self.jobs, self.owner = 0, os.getpid()
        self.close = weakref.finalize(self, _close, self.process, self.connection, self.owner)
        try:
            self.connection.recv()
        except EOFError:
            raise RuntimeError(f"the helper process did not start (exit code {self.process.wait()})") from None

    def do(self, job: Callable[..., Any], path: Path, *arguments: Any) -> Any:
        """Returns the result of a job; raises its exception, or _HelperDiedError."""
        self.jobs += 1
        try:
            self.connection.send((job, path, arguments))
            answer = self.connection.recv()
        except (OSError, EOFError):
            raise _HelperDiedError(self._exit_reason()) from None
        except BaseException:
            self.close()  # the answer would be read as that of the next job
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _exit_reason(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_SECONDS)  # it closed the connection, so it is about to exit
        self.close()
        code = self.process.returncode
        if code == -signal.SIGALRM:
            return f"takes longer than {MAX_READING_SECONDS} seconds"
        if code == MEMORY_EXIT:
            return f"needs more than {LARGEST_MEMORY // 1024**3} GiB of memory"
        return f"crashes the decoder ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def _close(process: "subprocess.Popen[bytes]", connection: Connection, owner: int) -> None:
    """Ends a helper; a forked child only closes its copy of the connection."""
    if os.getpid() == owner:
        process.kill()
        process.wait()
    else:
        process.returncode = 0  # the parent waits for it
    connection.close()


_thread = threading.local()
_rejected: dict[Path, str] = {}  # video -> message; another attempt would take as long


def _helper() -> _Helper:
    """Returns the helper of this thread; starts one if necessary."""
    helper: _Helper | None = getattr(_thread, "helper", None)
    if helper is not None and helper.close.alive and helper.owner == os.getpid() and helper.jobs < READS_PER_HELPER:
        return helper
    if helper is not None:
        helper.close()
    _thread.helper = _Helper()
    return _thread.helper


def _decode(job: Callable[..., Any], path: Path, *arguments: Any) -> Any:
    """Runs a job in a helper; if it dies, in a second one without decord."""
    if path in _rejected:
        raise UserError(_rejected[path])
    try:
        return _helper().do(job, path, *arguments)
    except _HelperDiedError:
        careful = _Helper(use_decord=False)
    try:
        return careful.do(job, path, *arguments)
    except _HelperDiedError as error:
        _rejected[path] = f"Decoding the video {path} {error}: convert it, or remove it."
        raise UserError(_rejected[path]) from error
    finally:
        careful.close()
