"""What every command does first, before it loads PyTorch.

Needs the standard library alone and runs on Python 3.6 too, since a user's first command is often started outside the
environment. So annotations are plain, and imports are inside functions.
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
MOST_NAMED = 3  # missing packages in the message; whoever misses one misses most
READABLE = "readable"  # the error handler of the streams
IN_ASCII = {"±": "+/-"}

INTERRUPTED_EXIT = 130  # what shells expect after Ctrl-C: a script or loop around the command ends too
STOPPED_EXIT = 75  # what sysexits.h calls a temporary failure: start the same command again
SIGNAL_EXITS = {signal.SIGINT: INTERRUPTED_EXIT, signal.SIGTERM: STOPPED_EXIT, signal.SIGUSR1: STOPPED_EXIT}


def start() -> None:
    """Prepares this process for a command, or ends it with one sentence and exit code 2.

    To be called by a command's file when it is run (not imported), before it imports anything else of the project.
    """
    for number in SIGNAL_EXITS:  # while modules load, an exception would end in a traceback
        signal.signal(number, _end_at_once)
    # On a CPU, OpenMP threads that wait by spinning starve other processes, and slow training down twentyfold when one
    # of these is busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The profiler's own log, which calls a machine without GPU an error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    open_streams()
    problem = unsuitable()
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    use_utf8_for_names()


def _end_at_once(number: int, frame: Any) -> None:
    """What a signal does while there is nothing to save; of several processes, the first reports it."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # not through sys.stderr, which this may have interrupted in a write
            os.write(2, f"stopped by {signal.Signals(number).name}; nothing was lost\n".encode())
    os._exit(SIGNAL_EXITS[signal.Signals(number)])


def unsuitable() -> str:
    """Why this interpreter cannot run the commands, and what to do, in one sentence; "" if it can."""
    if sys.version_info < (3, 10):  # noqa: UP036
        problems = ["Python 3.10 or newer is needed, this is {}.{}.{}".format(*sys.version_info[:3])]
    else:
        from run.requirements import missing

        problems = missing([str(ROOT / "requirements.txt")], with_optional=False)
    if not problems:
        return ""
    named = ", ".join(problems[:MOST_NAMED]) + (", ..." if len(problems) > MOST_NAMED else "")
    is_active = os.path.realpath(sys.prefix) == os.path.realpath(str(ENVIRONMENT))
    if not is_active and (ENVIRONMENT / "bin" / "python").exists():
        remedy = f"activate the environment first: . {ENVIRONMENT}/bin/activate"
    else:
        remedy = f"`sh train_test.sh` installs all that is needed into {ENVIRONMENT}"
    return f"{sys.executable} cannot run this command ({named}); {remedy}"


def use_utf8_for_names() -> None:
    """Starts this process again in Python's UTF-8 mode if names of files would be read in another encoding.

    Lists of videos are UTF-8. Under a locale such as ISO-8859-2, or C with Python's UTF-8 mode switched off, the same
    name on the disk would be another text. The output keeps the encoding of the terminal.
    """
    if sys.getfilesystemencoding().lower() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# --- output that never ends a command ---------------------------------------------------------------------


class _Output(io.FileIO):
    """A standard stream that drops what cannot be written: a long run matters more than its messages.

    The reader of a pipe may have left (`| head -1`), and the results are in a file too.
    """

    has_failed = False

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE and not self.has_failed and self.fileno() == 1:
                self.has_failed = True
                print(f"standard output is lost: {error.strerror}", file=sys.stderr)
            return len(data)


def open_streams() -> None:
    """Replaces standard output and error by streams that take every character and never fail."""
    codecs.register_error(READABLE, _readable)
    for number in (0, 1, 2):
        _open_if_closed(number)
    sys.stdout, sys.stderr = _stream(1, sys.stdout), _stream(2, sys.stderr)


def _open_if_closed(number: int) -> None:
    """Opens nothing under the number of a closed standard stream, which the next file opened would take otherwise."""
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        os.set_inheritable(number, True)  # for the processes that this one starts


def _stream(number: int, before: Any) -> TextIO:
    """Returns a stream in place of `before`, which is None where it was closed, with its encoding.

    Every line is written at once, in any kind of file, so that a log can be followed and its order holds.
    """
    output = io.BufferedWriter(_Output(number, "w", closefd=False))  # type: ignore[type-var]
    return io.TextIOWrapper(output, getattr(before, "encoding", "utf-8"), READABLE, line_buffering=True)


def _readable(error: UnicodeError) -> tuple:
    """An error handler for encoding: ± becomes +/-, a character without such a form is escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    escaped = (IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters)
    return "".join(escaped), error.end
