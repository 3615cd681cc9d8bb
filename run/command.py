"""How every command ends: a user's mistake becomes plain sentences, without a traceback, and an exit code."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

from utils.errors import StopRequested, UserError, memory_advice

DEFECT_EXIT = 1
USER_ERROR_EXIT = 2
INTERRUPTED_EXIT = 130  # the same as that of a training run that saves on Ctrl-C, see `run.stopping`


def run_command(main: Callable[[], int | None], interrupted: str = "") -> NoReturn:
    """Ends the process with the exit code of `main`, see `exit_code_of`.

    Args:
        main: the command.
        interrupted: what Ctrl-C prints; without it Ctrl-C ends the process at once, as `run.start` has arranged.
    """
    if interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(exit_code_of(main, interrupted or "interrupted"))


def exit_code_of(main: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Calls `main` and returns the exit code: its own, or that of the error that it raised, which is printed.

    A UserError prints its message and gives 2, Ctrl-C prints `interrupted` and gives 130. Of several processes, the
    first one that fails prints why; what the others then run into does not matter.
    """
    try:
        return main() or 0
    except UserError as error:
        return _end(f"error: {plain_message(error)}", USER_ERROR_EXIT)
    except OSError as error:
        if error.filename is None:
            raise
        return _end(
            f"error: {error.filename}: {error.strerror}; check the path, its permissions and the disk", USER_ERROR_EXIT
        )
    except KeyboardInterrupt:
        return _end(interrupted, INTERRUPTED_EXIT)
    except StopRequested as request:
        return _end(str(request), request.exit_code)
    except Exception as error:
        if advice := memory_advice(error):
            return _end(f"error: {advice}", USER_ERROR_EXIT)
        if not is_one_of_several():
            raise
        return _end(traceback.format_exc(), DEFECT_EXIT)
    finally:
        if is_one_of_several():
            _distributed().stop()


def _end(message: str, exit_code: int) -> int:
    """Prints why the command ends; returns the exit code, of several processes that of the first failure."""
    if is_one_of_several():
        return _distributed().tell(message, exit_code)
    print(message, file=sys.stderr)
    return exit_code


def is_one_of_several() -> bool:
    """Returns whether torchrun or SLURM started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _distributed() -> ModuleType:
    """Returns the functions for several processes; imported late, as not every command needs PyTorch."""
    from utils import distributed

    return distributed


def plain_message(error: UserError) -> str:
    """The sentence alone: a data loader's worker wraps it into its traceback."""
    message = str(error)
    marker = f"{UserError.__name__}: "
    if message.startswith(f"Caught {UserError.__name__} in DataLoader worker"):
        return message.rsplit(marker, 1)[1].strip()
    return message
