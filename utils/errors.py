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
