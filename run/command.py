"""How every command ends: a user's mistake is told in plain sentences, without a traceback."""

import sys
import traceback
from collections.abc import Callable

from run.stopping import StopRequested
from utils import distributed
from utils.errors import UserError

DEFECT_EXIT = 1
USER_ERROR_EXIT = 2
INTERRUPTED_EXIT = 130
STOPPED_EXIT = 75  # what sysexits.h calls a temporary failure: start the same command again, with --resume


def run_command(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Calls `main`; a UserError becomes its message on standard error and exit code 2; Ctrl-C says `interrupted`.

    Of several processes, the first one that fails says why; what the others then run into is of no interest.
    """
    try:
        main()
    except UserError as error:
        sys.exit(distributed.tell(f"error: {plain_message(error)}", USER_ERROR_EXIT))
    except OSError as error:
        if error.filename is None:
            raise
        said = f"error: {error.filename}: {error.strerror}; check the path, its permissions and the disk"
        sys.exit(distributed.tell(said, USER_ERROR_EXIT))
    except KeyboardInterrupt:
        sys.exit(distributed.tell(interrupted, INTERRUPTED_EXIT))
    except StopRequested as request:
        sys.exit(distributed.tell(str(request), STOPPED_EXIT))
    except Exception:
        if distributed.world_size() == 1:
            raise
        sys.exit(distributed.tell(traceback.format_exc(), DEFECT_EXIT))
    finally:
        distributed.stop()


def plain_message(error: UserError) -> str:
    """The sentence alone: a data loader's worker wraps it into its traceback."""
    message = str(error)
    marker = f"{UserError.__name__}: "
    if message.startswith(f"Caught {UserError.__name__} in DataLoader worker"):
        return message.rsplit(marker, 1)[1].strip()
    return message
