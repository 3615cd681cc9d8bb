"""Exceptions that end a command without a traceback, and helpers for messages."""

import re
import sysconfig
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path

LONGEST_REASON = 200  # characters
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
ROOT = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """An error in the user's config, data or files, one sentence per problem.

    The message names what was expected, what was found (path, key, class) and what to do. Commands print it without a
    traceback and end with exit code 2.
    """


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, which is given in the singular: `1 video`, `2 videos`, `1,234 classes`."""
    if number != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}es" if noun.endswith("ss") else f"{noun}s"
    return f"{number:,} {noun}"


def first_of(problems: Sequence[str], limit: int, kind: str = "") -> list[str]:
    """Returns the first sentences or names and, if there are more, their number: `... and 3 more problems`."""
    more = len(problems) - limit
    return [*problems[:limit], *([f"... and {more} more{kind}"] if more > 0 else [])]


def seen_from(path: Path) -> str:
    """Returns the folder that a missing relative path was looked up in, ` (in /home/me)`; '' for an absolute path."""
    return "" if path.is_absolute() else f" (in {Path.cwd()})"


class StopRequested(BaseException):
    """The end of a command after a signal; not an Exception, since code that handles errors must not catch it.

    Args:
        message: why the command ends, and how to continue.
        exit_code: of the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def reason_of(error: BaseException) -> str:
    """Shortens a library's message to one line, without PyTorch's advice to load a rejected file unsafely."""
    text = str(error)
    if isinstance(error, EOFError) or "PytorchStreamReader" in text or text.isdigit():  # digits: an unknown opcode
        return "it is empty, cut off or damaged"
    if match := re.search(r"GLOBAL (\S+)", text):
        text = f"it names {match[1]}"
    text = re.sub(r"\.? In PyTorch 2\.6, .*", "", text, flags=re.DOTALL)
    return textwrap.shorten(text or type(error).__name__, LONGEST_REASON, placeholder=" ...")


def import_problem(error: BaseException, module: str, importer: str) -> str:
    """Returns where and why the import of a user's module failed: file, line, reason.

    Args:
        error: the exception.
        module: the imported module, used if no line is known.
        importer: the file of this project that imported it; its lines are not the cause.
    """
    if isinstance(error, SyntaxError) and error.filename:
        file, line, reason = error.filename, error.lineno, error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        written = [f for f in frames if f.filename != importer and not f.filename.startswith(("<", *LIBRARIES))]
        file, line = (written[-1].filename, written[-1].lineno) if written else (module, None)
        reason = str(error)
    if Path(file).is_relative_to(ROOT):
        file = str(Path(file).relative_to(ROOT))
    place = f"{file}, line {line}" if line else file
    reason = textwrap.shorten(reason, LONGEST_REASON, placeholder=" ...")
    return f"{place}: {type(error).__name__}{': ' if reason else ''}{reason}"


# Out-of-memory messages of PyTorch's CPU allocator, CUDA and its libraries.
OUT_OF_MEMORY = (
    "out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip
WORKER_KILLED = "DataLoader worker (pid"
MEMORY_PAGE = "docs/troubleshooting.md#out-of-memory"


def memory_advice(error: BaseException) -> str | None:
    """Returns one line of advice for an out-of-memory error, None for any other error."""
    text = str(error)
    if text.startswith(WORKER_KILLED):
        return (
            f"a DataLoader worker was killed ({reason_of(error)}), usually because the machine ran out of memory or of "
            f"shared memory: lower DATA.NUM_WORKERS, see {MEMORY_PAGE}"
        )
    if isinstance(error, MemoryError) or any(message in text for message in OUT_OF_MEMORY):
        return f"out of memory ({reason_of(error)}): lower TRAIN.CHUNK or TEST.BATCH_EPISODES first, see {MEMORY_PAGE}"
    return None
