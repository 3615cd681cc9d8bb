"""The folder of a sweep: the states of its runs, failures, durations.

runs/<name>/      run directories          logs/<name>.txt   output of each run
state.json        attempts and failures    table.*, figure.* results
sweep.lock        lock of a running sweep  features/         features of frozen backbones
"""

import fcntl
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from run.run_directory import LOCK
from run.sweeping.plan import SweepRun
from utils.checkpoint import LAST
from utils.errors import UserError
from utils.files import NO_LOCKS, exclusive, write_atomically, writing

FINISHED, FAILED, INTERRUPTED, WAITING = "finished", "failed", "interrupted", "waiting"
LAST_LINES = 5


class SweepFolder:
    """The folder of one sweep. The state of a run is read from its files, so a killed sweep needs no repair."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: dict[str, dict[str, Any]] = {}
        if (path / "state.json").is_file():
            try:
                self.state = _checked(json.loads((path / "state.json").read_bytes()))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path / 'state.json'} is not the state of a sweep; remove it") from error

    def lock(self) -> AbstractContextManager[Any]:
        """Creates and locks the folder; raises UserError if another sweep uses it."""
        with writing(self.path / "sweep.lock"):
            self.path.mkdir(parents=True, exist_ok=True)
            return exclusive(self.path / "sweep.lock", f"the sweep folder {self.path}", "choose another one with --out")

    # --- one run ------------------------------------------------------------------------------------------

    def status(self, run: SweepRun) -> str:
        """Returns finished, failed, interrupted or waiting."""
        if run.result():
            return FINISHED
        if self._entry(run).get("failure"):
            return FAILED
        return INTERRUPTED if (run.directory / LAST).is_file() else WAITING

    def is_in_use(self, run: SweepRun) -> bool:
        """Returns whether a process of the run exists, for example one left by a killed sweep."""
        if run.log.is_file():
            with open(run.log, "rb") as log:
                if not try_lock(log):
                    return True
        if not (run.directory / LOCK).is_file():
            return False
        try:
            with exclusive(run.directory / LOCK, "", ""):
                return False
        except UserError:
            return True

    def record_start(self, run: SweepRun, **values: Any) -> None:
        """Records the start of an attempt; `values` are kept until the next attempt."""
        self._write_entry(run, {"before": self.seconds_so_far(run), "started": time.time(), **values})

    def record_failure(self, run: SweepRun, reason: str) -> None:
        """Records a failure with the last lines of the output; it is kept until `record_start`."""
        self._write_entry(run, {**self._entry(run), "failure": "\n".join([reason, *last_lines(run.log)])})

    def record_duration(self, run: SweepRun, seconds: float) -> None:
        """Records the duration of a run whose files do not show it, since jobs wait in a queue."""
        self._write_entry(run, {**self._entry(run), "seconds": seconds})

    def failure(self, run: SweepRun) -> str:
        """Returns the reason for a failure and the last lines of the output."""
        return str(self._entry(run).get("failure", ""))

    def recorded(self, run: SweepRun, key: str) -> Any:
        """Returns a value that `record_start` has recorded, or None."""
        return self._entry(run).get(key)

    def seconds(self, run: SweepRun) -> float | None:
        """Returns the duration of a finished run over all its attempts; None if the sweep did not start it."""
        result, entry = run.result(), self._entry(run)
        if result is None or "started" not in entry:
            return None
        if "seconds" in entry:
            return float(entry["seconds"])
        return float(entry["before"] + max(0.0, result.stat().st_mtime - entry["started"]))

    def seconds_so_far(self, run: SweepRun) -> float:
        """Returns the seconds of earlier attempts up to the last checkpoint, from which the next one resumes."""
        entry, last = self._entry(run), run.directory / LAST
        if "started" not in entry or not last.is_file():
            return 0.0
        return float(entry["before"] + max(0.0, last.stat().st_mtime - entry["started"]))

    def _entry(self, run: SweepRun) -> dict[str, Any]:
        return self.state.get(run.name, {})

    def _write_entry(self, run: SweepRun, content: dict[str, Any]) -> None:
        self.state[run.name] = content
        with writing(self.path / "state.json"):
            write_atomically(self.path / "state.json", (json.dumps(self.state, indent=1) + "\n").encode())

    # --- all runs -----------------------------------------------------------------------------------------

    def estimates(self, runs: Sequence[SweepRun]) -> dict[str, float]:
        """Returns the expected seconds by run name, from the most similar finished runs; empty if there are none."""
        done = [(run, seconds) for run in runs if (seconds := self.seconds(run)) is not None]
        similarity_keys: tuple[Callable[[SweepRun], Any], ...] = (
            lambda run: (run.row, run.column),
            lambda run: (run.config.MODEL.NAME, run.column),
            lambda run: run.config.MODEL.NAME,
            lambda run: None,
        )
        expected: dict[str, float] = {}
        for key in similarity_keys:
            groups: dict[Any, list[float]] = {}
            for run, seconds in done:
                groups.setdefault(key(run), []).append(seconds)
            for run in runs:
                if key(run) in groups:
                    expected.setdefault(run.name, statistics.fmean(groups[key(run)]))
        return expected


def try_lock(log: IO[bytes]) -> bool:
    """Locks the file of a run's output; returns whether no other process has the lock.

    The process of a run inherits the lock with its standard output, and so holds it from start to end.
    """
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def last_lines(log: Path) -> list[str]:
    """Returns the last lines of the output of a run."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-LAST_LINES:]


def duration(seconds: float) -> str:
    """Returns a duration as text: 45 s, 12 min, 3.5 h."""
    if seconds < 99:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def unique(runs: Iterable[SweepRun]) -> list[SweepRun]:
    """Returns the runs without duplicates."""
    return list({run.name: run for run in runs}.values())


def _checked(content: Any) -> dict[str, dict[str, Any]]:
    """Returns the content of state.json. Raises ValueError if it is not run name -> entry, with numbers as times."""
    entries = list(content.values()) if isinstance(content, dict) else [None]
    for entry in entries:
        if not isinstance(entry, dict) or ("started" in entry and "before" not in entry):
            raise ValueError("not the entry of a run")
        if not all(isinstance(entry.get(key, 0), int | float) for key in ("before", "started", "seconds")):
            raise ValueError("a time is not a number")
    return content
