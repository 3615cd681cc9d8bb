"""The one exception for mistakes that a user can make and mend, and what other libraries say in one line."""

import re
import textwrap

LONGEST_REASON = 200  # characters


class UserError(Exception):
    """A mistake in the user's config, data or files, told in one sentence a problem.

    The message says what was expected, what was found (path, key, class) and what to do next.
    The commands print it without a traceback and leave with exit code 2.
    """


def reason_of(error: BaseException) -> str:
    """Another library's message in one line, without PyTorch's advice to read a refused file without its guard."""
    text = str(error)
    if refused := re.search(r"GLOBAL (\S+)", text):
        text = f"it names {refused[1]}"
    text = re.sub(r"\.? In PyTorch 2\.6, .*", "", text, flags=re.DOTALL)
    return textwrap.shorten(text or type(error).__name__, LONGEST_REASON, placeholder=" ...")
