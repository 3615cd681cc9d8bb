"""What all commands share: numbers and checkpoints as arguments, and the exit.

A user error prints a message without a traceback and sets the exit code.
"""

import argparse
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

from run.start import INTERRUPTED_EXIT, SIGNAL_EXITS
from utils.errors import StopRequested, UserError, memory_advice
from utils.files import raise_if_missing
from utils.logs import FILE_ONLY

DEFECT_EXIT = 1
USER_ERROR_EXIT = 2

logger = logging.getLogger(__name__)


def number(kind: type[int] | type[float], minimum: float, maximum: float = math.inf) -> Callable[[str], Any]:
    """Returns a parser of numbers of a kind from `minimum` to `maximum`."""
    bounds = f"from {minimum:g} to {maximum:g}" if maximum < math.inf else f"of at least {minimum:g}"
    expected = f"a {'whole number' if kind is int else 'number'} {bounds}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
        return value

    return parse


def checkpoint(path: str) -> Path:
    """Returns the path of a checkpoint, a parser of arguments that reports a missing file before PyTorch is imported.

    Raises:
        UserError: the file is missing.
    """
    raise_if_missing(Path(path))
    return Path(path)


def run_command(main: Callable[[], int | None], if_stopped: str = "") -> NoReturn:
    """Runs `main` and ends the process with its exit code; see `exit_code_of`.

    Args:
        main: the command.
        if_stopped: text that a signal (Ctrl-C, SIGTERM, SIGUSR1) prints after its name. The signal then ends `main`
            with an exception, so that no half-written file remains. By default a signal ends the process at once,
            unless `main` handles it.
    """
    if if_stopped:
        for number in SIGNAL_EXITS:
            signal.signal(number, partial(_stop, if_stopped))
    sys.exit(exit_code_of(main))


def _stop(if_stopped: str, number: int, frame: FrameType | None) -> NoReturn:
    """Ends the command with an exception; a second signal ends the process at once."""
    for other in SIGNAL_EXITS:
        signal.signal(other, lambda number, frame: os._exit(128 + number))
    name = signal.Signals(number).name
    raise StopRequested(f"stopped by {name}; {if_stopped}", SIGNAL_EXITS[signal.Signals(number)])


def exit_code_of(main: Callable[[], int | None]) -> int:
    """Calls `main` and returns its exit code, or prints the error that it raised and returns the code of that error.

    UserError prints its message and returns 2, a signal prints its name and returns 75, Ctrl-C returns 130. With
    several processes, only the first one that fails prints its error.
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
        return _end("interrupted", INTERRUPTED_EXIT)
    except StopRequested as request:
        return _end(str(request), request.exit_code)
    except Exception as error:
        if advice := memory_advice(error):
            return _end(f"error: {advice}", USER_ERROR_EXIT)
        if not has_several_processes():
            raise
        return _end(traceback.format_exc(), DEFECT_EXIT)
    finally:
        if has_several_processes():
            _distributed().stop()


def _end(message: str, exit_code: int) -> int:
    """Prints why the command ends and returns the exit code; with several processes, that of the first failure."""
    logger.info(message, extra=FILE_ONLY)
    if has_several_processes():
        return _distributed().report(message, exit_code)
    print(message, file=sys.stderr)
    return exit_code


def has_several_processes() -> bool:
    """Returns whether torchrun or SLURM started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _distributed() -> ModuleType:
    """Imports the functions for several processes only when needed, since not every command needs PyTorch."""
    from utils import distributed

    return distributed


def plain_message(error: UserError) -> str:
    """Returns the message without the traceback that a DataLoader worker adds."""
    message = str(error)
    marker = f"{UserError.__name__}: "
    if message.startswith(f"Caught {UserError.__name__} in DataLoader worker"):
        return message.rsplit(marker, 1)[1].strip()
    return message
