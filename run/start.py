"""Starts every command, before PyTorch is loaded.

This module uses only the standard library and also runs on Python 3.6, since a user's first command often runs outside
the environment. Annotations are therefore plain, and imports are inside functions.
"""

import codecs
import contextlib
import errno
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"
MAX_NAMED = 3  # missing packages named in the message
READABLE = "readable"  # name of the error handler of the streams
IN_ASCII = {"±": "+/-"}

INTERRUPTED_EXIT = 130  # shells expect it after Ctrl-C, and then also end a script or loop around the command
STOPPED_EXIT = 75  # a temporary failure in sysexits.h: start the same command again
SIGNAL_EXITS = {signal.SIGINT: INTERRUPTED_EXIT, signal.SIGTERM: STOPPED_EXIT, signal.SIGUSR1: STOPPED_EXIT}


def start() -> None:
    """Prepares this process for a command, or ends it with one sentence and exit code 2.

    A command's file calls this when it is run (not imported), before it imports other modules of the project.
    """
    for number in SIGNAL_EXITS:  # while modules load, an exception would print a traceback
        signal.signal(number, _exit_now)
    # OpenMP threads that spin while they wait starve other processes; training then takes up to 20 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The profiler logs an error on a machine without a GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    open_streams()
    problem = interpreter_problem()
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    use_utf8_for_names()


def _exit_now(number: int, frame: Any) -> None:
    """Handles a signal while there is nothing to save; with several processes, the first one reports it."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # os.write, since the signal may have interrupted a write to sys.stderr
            os.write(2, f"stopped by {signal.Signals(number).name}; no progress was lost\n".encode())
    os._exit(SIGNAL_EXITS[signal.Signals(number)])


def interpreter_problem() -> str:
    """Returns why this interpreter cannot run the commands and what to do, in one sentence, or ""."""
    if sys.version_info < (3, 10):  # noqa: UP036
        problems = ["Python 3.10 or newer is needed, this is {}.{}.{}".format(*sys.version_info[:3])]
    else:
        from run.requirements import missing

        problems = missing([str(ROOT / "requirements.txt")], with_optional=False)
    if not problems:
        return ""
    named = ", ".join(problems[:MAX_NAMED]) + (", ..." if len(problems) > MAX_NAMED else "")
    is_active = os.path.realpath(sys.prefix) == os.path.realpath(str(ENVIRONMENT))
    if not is_active and (ENVIRONMENT / "bin" / "python").exists():
        remedy = f"activate the environment first: . {ENVIRONMENT}/bin/activate"
    else:
        remedy = f"`sh train_test.sh` installs everything into {ENVIRONMENT}"
    return f"{sys.executable} cannot run this command ({named}); {remedy}"


def use_utf8_for_names() -> None:
    """Restarts this process in Python's UTF-8 mode if file names would be read in another encoding.

    Lists of videos are UTF-8. Under a locale such as ISO-8859-2, or C without Python's UTF-8 mode, file names would be
    decoded incorrectly. The output keeps the encoding of the terminal.
    """
    if sys.getfilesystemencoding().lower() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# --- output that never fails ------------------------------------------------------------------------------


class _Output(io.FileIO):
    """A standard stream that ignores failed writes: a long run matters more than its messages.

    The reader of a pipe may have exited (`| head -1`), and the results are in a file too.
    """

    has_failed = False

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE and not self.has_failed and self.fileno() == 1:
                self.has_failed = True
                print(f"cannot write to standard output: {error.strerror}", file=sys.stderr)
            return len(data)


def open_streams() -> None:
    """Replaces standard output and error with streams that accept every character and never fail."""
    codecs.register_error(READABLE, _readable)
    for number in (0, 1, 2):
        _open_if_closed(number)
    sys.stdout, sys.stderr = _stream(1, sys.stdout), _stream(2, sys.stderr)


def _open_if_closed(number: int) -> None:
    """Opens the null device for a closed standard stream; otherwise the next opened file would get its number."""
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        os.set_inheritable(number, True)  # for the processes that this one starts


def _stream(number: int, before: Any) -> TextIO:
    """Returns a replacement for a stream, with its encoding; `before` is None for a closed stream.

    Every line is flushed at once, so that a log can be followed and keeps its order.
    """
    output = io.BufferedWriter(_Output(number, "w", closefd=False))  # type: ignore[type-var]
    return io.TextIOWrapper(output, getattr(before, "encoding", "utf-8"), READABLE, line_buffering=True)


def _readable(error: UnicodeError) -> tuple:
    """Replaces characters that cannot be encoded: ± becomes +/-, others are escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    escaped = (IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters)
    return "".join(escaped), error.end
