"""Starts the runs that are not finished, several at a time; each is an ordinary run in its own process."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from run.start import INTERRUPTED_EXIT, STOPPED_EXIT
from run.sweeping.folder import FINISHED, SweepFolder, duration
from run.sweeping.plan import SweepRun
from utils.errors import counted
from utils.jobs import progress


class Job(Protocol):
    """A run that was started."""

    def exit_code(self) -> int | None:
        """Returns the exit code, None before the run ends."""

    def stop(self) -> None:
        """Asks the run to save and end, and returns at once."""


class Machine(Protocol):
    """Starts runs: on this machine or a cluster."""

    jobs: int  # runs at a time
    poll_seconds: float

    def start(self, runs: Sequence[SweepRun], folder: SweepFolder) -> list[Job]:
        """Starts or resumes runs, and records this in the folder; returns their jobs in the same order."""

    def close(self) -> None:
        """Stops the runs that must end with the sweep, and returns when they have saved."""


class Execution:
    """Starts runs on a machine until all have ended."""

    activity, unit = "sweep", "run"  # words of the progress display

    def __init__(
        self, runs: Sequence[SweepRun], folder: SweepFolder, machine: Machine, when_finished: Callable[[], None]
    ) -> None:
        """Stores the runs, each once; `when_finished` is called after every successful run."""
        self.runs, self.folder, self.machine, self.when_finished = runs, folder, machine, when_finished
        self.running: dict[str, tuple[SweepRun, Job, float]] = {}
        self.waiting: deque[SweepRun] = deque()

    def run(self, runs_to_do: Sequence[SweepRun]) -> None:
        """Runs all of `runs_to_do` in order; a failure is recorded in the folder and does not stop other runs."""
        self.waiting.extend(runs_to_do)
        with progress(None, len(self.runs), self.activity, self.unit, in_lines=True) as bar:
            bar.bar_format = f"{{desc}}: {{n_fmt}} of {{total_fmt}} {self.unit}s |{{bar}}| {{postfix}}"
            bar.update(len(self.runs) - len(runs_to_do))
            bar.write(f"{counted(len(runs_to_do), self.unit)} to do")
            try:
                while self.waiting or self.running:
                    for run in [*self.ended(), *self.start()]:
                        bar.write(self._line(run))
                        bar.n += 1
                    bar.set_postfix_str(self.progress_text())
                    time.sleep(self.machine.poll_seconds)
            except BaseException:
                self.machine.close()
                raise

    def start(self) -> list[SweepRun]:
        """Starts runs while fewer than `machine.jobs` are running; returns those that ended without being started.

        Processes left by a killed sweep count as running; their runs wait until these processes end.
        """
        ended: list[SweepRun] = []
        started: list[SweepRun] = []
        still_running = [run for run in self.waiting if self.folder.is_in_use(run)]
        for run in [run for run in self.waiting if run not in still_running]:
            if len(self.running) + len(still_running) + len(started) >= self.machine.jobs:
                break
            self.waiting.remove(run)
            if self.folder.status(run) == FINISHED:
                ended.append(run)
                self.when_finished()
            elif prepared := self.prepared(run):
                started.append(prepared)
            else:
                ended.append(run)
        for run, job in zip(started, self.machine.start(started, self.folder), strict=True):
            self.running[run.name] = run, job, time.monotonic()
        return ended

    def prepared(self, run: SweepRun) -> SweepRun | None:
        """Returns the run to start, or None if it ends without being started."""
        return run

    def ended(self) -> list[SweepRun]:
        """Returns the runs that have ended since the last call, after recording failures."""
        ended = [(run, code) for run, job, _ in self.running.values() if (code := job.exit_code()) is not None]
        for run, code in ended:
            del self.running[run.name]
            if code in (STOPPED_EXIT, INTERRUPTED_EXIT):
                pass  # saved: the next sweep resumes it
            elif code or not run.result():
                self.folder.record_failure(
                    run, f"ended with exit code {code}" if code >= 0 else f"ended by signal {-code}"
                )
            else:
                self.when_finished()
        return [run for run, _ in ended]

    def _line(self, run: SweepRun) -> str:
        """Returns the line that reports the end of a run."""
        seconds = self.folder.seconds(run)
        took = f" in {duration(seconds)}" if seconds is not None else ""
        return f"{self.status(run)}{took}: {run.title}"

    def status(self, run: SweepRun) -> str:
        """Returns the state of a run."""
        return self.folder.status(run)

    def progress_text(self) -> str:
        """Returns how many runs are running and, once it can be estimated, how long all will take."""
        estimates, now = self.folder.estimates(self.runs), time.monotonic()
        text = f"{len(self.running)} running"
        if not all(run.name in estimates for run in (*self.waiting, *(run for run, _, _ in self.running.values()))):
            return text
        seconds = sum(estimates[run.name] for run in self.waiting)
        seconds += sum(max(0.0, estimates[run.name] - (now - start)) for run, _, start in self.running.values())
        return f"{text}, {duration(seconds / min(self.machine.jobs, len(self.runs)))} left"
