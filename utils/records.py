"""What a run leaves behind: its directory, its metrics, its results."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch.utils.tensorboard import SummaryWriter

from utils import distributed
from utils.checkpoint import LAST
from utils.errors import UserError
from utils.lock import LOCK, lock_directory

METRICS = "metrics.jsonl"
TRACE_SUFFIX = ".pt.trace.json"  # what TensorBoard's profiler plugin looks for


def open_run_directory(directory: Path, resume: bool, started_by: str = "") -> IO[str]:
    """Creates the directory of a run, or continues in that of an earlier run; returns the lock that it takes.

    Args:
        directory: of the run.
        resume: whether an earlier run may be continued.
        started_by: noted with the lock, see `utils.distributed.launcher`.

    Raises:
        UserError: it holds files already and the run is not to resume, or cannot be resumed, or is still running.
    """
    if directory.is_file():
        raise UserError(f"CHECKPOINT.CHECKPOINT_DIR: {directory} is a file; name a directory")
    _refuse_contents(directory, resume)  # before the lock, so that in a directory of others not even that is written
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"CHECKPOINT.CHECKPOINT_DIR: cannot create {directory}: {error.strerror}") from error
    with writing(directory / LOCK):
        lock = lock_directory(directory, started_by)
    _refuse_contents(directory, resume)  # a run that was a moment faster may have ended already
    return lock


def _refuse_contents(directory: Path, resume: bool) -> None:
    """Raises UserError for a directory whose files forbid to start, or to resume, a run in it."""
    has_run = directory.is_dir() and any(not _is_no_run(path) for path in directory.iterdir())
    if has_run and resume and not can_resume(directory):
        raise UserError(
            f"the run directory {directory} is not empty but holds no {LAST} to resume from, and is never overwritten: "
            f"name another one with CHECKPOINT.CHECKPOINT_DIR"
        )
    if has_run and not resume:
        raise UserError(
            f"the run directory {directory} is not empty and is never overwritten: continue its run with --resume, or "
            f"start another with CHECKPOINT.CHECKPOINT_DIR=another_directory"
        )


def _is_no_run(path: Path) -> bool:
    """Whether a file is no part of a training run: a lock, a test's result, a trace, or what a killed write left."""
    is_result = path.name.startswith("results") and path.suffix == ".json"
    return is_result or path.name == LOCK or path.suffix == ".part" or path.name.endswith(TRACE_SUFFIX)


def can_resume(directory: Path) -> bool:
    """Whether a run directory holds a checkpoint to go on from."""
    return (directory / LAST).is_file()


class MetricsWriter:
    """The same numbers as TensorBoard scalars and as lines of a JSONL file; of several processes, one writes."""

    def __init__(self, directory: Path, first_episode: int = 0, validation_due: bool = False) -> None:
        """Goes on after episode `first_episode`: later lines of an interrupted run are dropped.

        If its validation is still to be made, so is the line of one that was made but not saved.
        """
        self.writes = distributed.is_main()
        if not self.writes:
            return
        self.file = directory / METRICS
        if self.file.is_file():
            with writing(self.file):
                _keep_until(self.file, first_episode, validation_due)
        self.directory = directory / "tensorboard"
        with writing(self.directory):
            self.tensorboard = SummaryWriter(self.directory, purge_step=first_episode + 1 if first_episode else None)

    def write(self, episode: int, group: str, values: dict[str, float]) -> None:
        """One line `{"episode": ..., "<group>/<name>": ...}` and one scalar each.

        Raises:
            UserError: a file cannot be written.
        """
        if not self.writes:
            return
        named = {f"{group}/{name}": value for name, value in values.items()}
        with writing(self.file), open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"episode": episode, **named}) + "\n")
        with writing(self.directory):
            for name, value in named.items():
                self.tensorboard.add_scalar(name, value, episode)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Flushes what TensorBoard still holds; of two errors, the first one is told."""
        if not self.writes:
            return
        try:
            self.tensorboard.close()
        except OSError as error:
            if kind is None:
                raise UserError(_cannot_write(self.directory, error)) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within this block a full disk, or whatever else forbids to write, becomes a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from error


def _cannot_write(path: Path, error: OSError) -> str:
    return (
        f"cannot write {path}: {error.strerror}; mend that (df -h shows the room on each disk) and start the run "
        f"again: what was saved before is whole"
    )


def _keep_until(file: Path, episode: int, validation_due: bool) -> None:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _episode_of(line) <= episode]
    if validation_due:
        kept = [line for line in kept if _episode_of(line) < episode or "val/accuracy" not in json.loads(line)]
    temporary = file.with_name(file.name + ".part")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, file)


def _episode_of(line: str) -> float:
    """The episode of a line; a line that was cut off or is none of ours counts as later than any."""
    try:
        return float(json.loads(line)["episode"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def write_results(directory: Path, results: dict[str, Any]) -> Path:
    """Writes results.json, or results_2.json, ... if there is one already; returns its path.

    Raises:
        UserError: it cannot be written; nothing is left of it then.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with writing(directory / "results.json"):
        path = new_file(directory, "results", ".json")
        temporary = path.with_name(path.name + ".part")
        try:
            temporary.write_bytes(as_json(results))
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            path.unlink()
            raise
    return path


def as_json(content: Any) -> bytes:
    """Returns UTF-8 JSON that reads back as the same text, also for names of files that are not UTF-8."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def new_file(directory: Path, stem: str, suffix: str) -> Path:
    """Creates the first of <stem><suffix>, <stem>_2<suffix>, ... that is not there yet, empty."""
    number = 1
    while True:
        path = directory / (f"{stem}{suffix}" if number == 1 else f"{stem}_{number}{suffix}")
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return path
