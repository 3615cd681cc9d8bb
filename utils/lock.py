"""One run in one directory: a lock that the system takes back when its process ends, however it ends.

It is a POSIX record lock, which also holds between the machines of a network file system that knows locks (NFS 4, or
NFS 3 with its lock service). Unlike the one of `flock` it stays with the process that took it: data loading processes,
which outlive a killed run by some seconds, do not hold it. The file stays behind and says who held it last.
"""

import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError

LOCK = "run.lock"

logger = logging.getLogger(__name__)


def lock_directory(directory: Path, started_by: str) -> IO[str]:
    """Takes the lock of a run directory and notes who has it; it is held until the file is closed.

    Raises:
        UserError: another process has it; the message names the process and its machine.
        OSError: the file cannot be written.
    """
    file = open(directory / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - closing it would give the lock back
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = last_holder(directory)
        raise UserError(
            f"the run directory {directory} is in use by process {holder.get('process', '?')} on machine "
            f"{holder.get('machine', '?')}: wait until it ends, or name another directory with "
            f"CHECKPOINT.CHECKPOINT_DIR"
        ) from error
    except OSError as error:
        logger.warning(
            "the file system of %s has no locks (%s): see to it that no second run uses this directory",
            directory, error.strerror,
        )  # fmt: skip
    holder = {"machine": socket.gethostname(), "process": os.getpid(), "started_by": started_by}
    file.truncate(0)
    os.write(file.fileno(), json.dumps(holder).encode() + b"\n")  # at once: a full disk fails here, not at the close
    return file


def last_holder(directory: Path) -> dict[str, Any]:
    """What the process that holds the lock, or held it last, noted: machine, process, started_by; empty if nothing.

    Not to be called by the process that holds the lock: closing any handle of the file gives a POSIX lock back.
    """
    try:
        noted = json.loads((directory / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}
