"""How every command ends: a user's mistake is told in plain sentences, without a traceback."""

import sys
from collections.abc import Callable

from utils.errors import UserError

USER_ERROR_EXIT = 2
INTERRUPTED_EXIT = 130


def run_command(main: Callable[[], None]) -> None:
    """Calls `main`; a UserError becomes its message on standard error and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {plain_message(error)}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT)


def plain_message(error: UserError) -> str:
    """The sentence alone: a data loader's worker wraps it into its traceback."""
    message = str(error)
    marker = f"{UserError.__name__}: "
    if message.startswith(f"Caught {UserError.__name__} in DataLoader worker"):
        return message.rsplit(marker, 1)[1].strip()
    return message
