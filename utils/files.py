"""Files and folders: atomic writes, new names, missing checkpoints, locks, and Git LFS pointers."""

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from utils.errors import UserError, seen_from

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # from file systems without locks, such as network drives

CACHE_VARIABLE = "FSAR_CACHE"
CACHE = "~/.cache/few-shot-action-recognition"

# The beginning of the small text file that a clone without Git LFS has in place of a video, an image or weights.
POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_POINTER = 1024  # bytes, by its specification
FROM_TRAINING = "a training run wrote (checkpoint_best.pt)"

logger = logging.getLogger(__name__)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file atomically: at any moment, it has either the old or the complete new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write_bytes(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file; an OSError names it, which the system's error for a full disk does not."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def cache_folder() -> Path:
    """Returns the folder of files that make later commands start faster: $FSAR_CACHE, or `CACHE`.

    The files are small and can be deleted at any time.
    """
    return Path(os.environ.get(CACHE_VARIABLE) or CACHE).expanduser()


def raise_if_not_new(*paths: Path | None) -> None:
    """Raises UserError for an output path that exists, is named twice, or cannot be written; skips None.

    Commands call this before they compute anything, since nothing is overwritten.
    """
    outputs = [(path, Path(os.path.abspath(path))) for path in paths if path]
    named = [absolute for _, absolute in outputs]
    for path, absolute in outputs:
        if path.exists():
            raise UserError(f"{path} exists already and is not overwritten; choose another name")
        if named.count(absolute) > 1:
            raise UserError(f"{path} is named for two outputs; choose another name for one of them")
        folder = next(parent for parent in absolute.parents if os.path.lexists(parent))
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise UserError(
                f"cannot write {path}: {folder} is not a folder with write permission; choose another place"
            )


def raise_if_missing(path: Path, expected: str = FROM_TRAINING) -> None:
    """Raises UserError if a checkpoint is missing; `expected` describes the file, as in `load_checkpoint`."""
    if path.is_dir():
        raise UserError(f"no such checkpoint: {path} is a folder; set the path to a file in it that {expected}")
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}{seen_from(path)}; set the path to a file that {expected}")


def new_file(directory: Path, stem: str, suffix: str) -> Path:
    """Creates the first of <stem><suffix>, <stem>_2<suffix>, ... that does not exist yet, empty; returns its path."""
    number = 1
    while True:
        path = directory / (f"{stem}{suffix}" if number == 1 else f"{stem}_{number}{suffix}")
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError within this block (a full disk, missing permissions) into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; fix this (df -h shows the free space of each disk) and start "
            f"the run again: earlier files are intact"
        ) from error


def exclusive(lock_file: Path, folder: str, instead: str) -> AbstractContextManager[Any]:
    """Locks a folder until the returned context ends or is deleted, or the process ends.

    The system releases the lock of a killed process; processes forked from it do not hold it. A process may take its
    lock again. The lock file remains and names the last holder, see `last_holder`.

    Args:
        lock_file: the lock file, in the folder, which must exist.
        folder: name and path of the folder, for messages.
        instead: how to use another folder, for messages.

    Raises:
        UserError: another process has the lock; the message names the process and its machine.
        OSError: the lock file cannot be written.
    """
    options: dict[str, Any] = {"thread_local": False, "is_singleton": True, "fallback_to_soft": False}
    lock = FileLock(lock_file, timeout=0, on_acquired=_note_holder, **options)
    try:
        return lock.acquire()
    except Timeout as error:
        holder = last_holder(lock_file)
        raise UserError(
            f"{folder} is in use by process {holder.get('process', '?')} on machine {holder.get('machine', '?')}: "
            f"wait until it ends, or {instead}"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning(
            "the file system of %s does not support locks (%s): make sure that no other process uses it",
            folder,
            error.strerror,
        )
        with open(lock_file, "wb") as file:
            _note_holder(file.fileno())
        return nullcontext()


def _note_holder(descriptor: int) -> None:
    """Writes the holder to the lock file, unbuffered, so that a full disk fails here."""
    holder = {"machine": socket.gethostname(), "process": os.getpid(), "started_by": launcher()}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(holder).encode() + b"\n")


def last_holder(lock_file: Path) -> dict[str, Any]:
    """Returns the last holder of a lock: machine, process, started_by; empty if the lock file names none."""
    try:
        holder = json.loads(lock_file.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def launcher() -> str:
    """Returns a text that is the same for all processes that one torchrun starts and restarts on a machine."""
    return f"{socket.gethostname()} {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID', '')}"


def is_lfs_pointer(path: Path) -> bool:
    """Returns whether a file is a Git LFS pointer; false for an unreadable file, whose reader reports it."""
    try:
        if os.path.getsize(path) >= LARGEST_POINTER:
            return False
        with open(path, "rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def raise_if_lfs_pointer(path: Path) -> None:
    """Raises UserError for a file that is a Git LFS pointer."""
    if is_lfs_pointer(path):
        raise UserError(
            f"{path} is a Git LFS pointer instead of the file itself: run `git lfs pull` in the repository that it "
            "comes from, or download the file."
        )
