"""The exceptions that end a command without a traceback, and other libraries' messages in one line."""

import re
import textwrap

LONGEST_REASON = 200  # characters


class UserError(Exception):
    """A mistake in the user's config, data or files, told in one sentence a problem.

    The message says what was expected, what was found (path, key, class) and what to do next.
    The commands print it without a traceback and leave with exit code 2.
    """


class StopRequested(BaseException):
    """A signal asked the command to end; not an Exception, since code that handles errors must not catch it.

    Args:
        message: why the command ends, and how to continue.
        exit_code: of the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def reason_of(error: BaseException) -> str:
    """Another library's message in one line, without PyTorch's advice to read a refused file without its guard."""
    text = str(error)
    if refused := re.search(r"GLOBAL (\S+)", text):
        text = f"it names {refused[1]}"
    text = re.sub(r"\.? In PyTorch 2\.6, .*", "", text, flags=re.DOTALL)
    return textwrap.shorten(text or type(error).__name__, LONGEST_REASON, placeholder=" ...")


# What PyTorch's CPU allocator, CUDA and its libraries report when there is no memory left.
OUT_OF_MEMORY = (
    "out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip
WORKER_KILLED = "DataLoader worker (pid"
MEMORY_PAGE = "docs/troubleshooting.md#out-of-memory"


def memory_advice(error: BaseException) -> str | None:
    """Returns one line of advice for an error that comes from missing memory, None for any other error."""
    text = str(error)
    if text.startswith(WORKER_KILLED):
        return (
            f"a DataLoader worker was killed ({reason_of(error)}), usually because the machine ran out of memory or of "
            f"shared memory: lower DATA.NUM_WORKERS, see {MEMORY_PAGE}"
        )
    if isinstance(error, MemoryError) or any(message in text for message in OUT_OF_MEMORY):
        return f"out of memory ({reason_of(error)}): lower TRAIN.CHUNK or TEST.BATCH_EPISODES first, see {MEMORY_PAGE}"
    return None
