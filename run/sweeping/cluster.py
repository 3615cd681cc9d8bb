"""Starts runs on a SLURM cluster through submitit, as an array of jobs that are requeued when their time limit ends.

The jobs stay in the queue when the sweep ends; the same command finds them again.
"""

import functools
import math
import os
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run.sweeping.execution import Job
from run.sweeping.folder import SweepFolder
from run.sweeping.plan import SweepRun
from run.sweeping.process import RunInJob
from utils.config import REPOSITORY
from utils.errors import UserError

MANY = 10_000  # runs at a time; the queue decides how many
MAX_REQUEUES = 100
SECONDS_TO_SAVE = 180  # SLURM signals the job this long before its time limit
SECONDS_BETWEEN_QUERIES = 30.0
TIME_LIMIT = re.compile(r"(?:(?P<days>\d+)-)?(\d+)(?::(\d+)(?::(?P<third>\d+))?)?")
LOST = 1  # exit code for a job that left the queue without a result


@dataclass
class ClusterJob:
    """A job in the queue, or one that has left it."""

    job: Any
    run: SweepRun
    folder: SweepFolder
    last_seen: float = -math.inf

    def exit_code(self) -> int | None:
        """Returns the exit code of the run, None before the run ends."""
        if self.job.paths.result_pickle.exists():
            try:
                code, seconds = self.job.result()
            except Exception:  # submitit raises the job's exception or one of its own
                return LOST
            self.folder.record_duration(self.run, seconds)
            return int(code)
        return None if self.is_queued() else LOST

    def is_queued(self) -> bool:
        """Returns whether the job was in the queue recently; its result may appear after it has left the queue."""
        now = time.monotonic()
        jobs = queue(int(now / SECONDS_BETWEEN_QUERIES))
        if jobs is None or self.job.job_id in jobs:
            self.last_seen = now
        return now - self.last_seen < 2 * SECONDS_BETWEEN_QUERIES

    def stop(self) -> None:
        """Asks the run to save and end."""
        subprocess.run(["scancel", "--signal=TERM", self.job.job_id], check=False)


@functools.lru_cache(maxsize=1)
def queue(period: int) -> set[str] | None:
    """Returns the jobs in the queue, or None if a busy cluster does not answer; the result is kept for one period."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.environ.get('USER', os.getuid())}"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return None if answer.returncode else set(answer.stdout.split())


class Cluster:
    """A SLURM cluster; all runs are submitted at once, as one array."""

    poll_seconds = 5.0

    def __init__(self, folder: SweepFolder, parameters: dict[str, Any], jobs: int | None) -> None:
        """Stores the parameters of a job for submitit, and how many jobs of the array may run at a time.

        Raises:
            UserError: submitit or SLURM is missing here, or a parameter is unknown.
        """
        self.jobs = jobs or MANY
        self.executor = _executor(folder.path / "slurm", parameters | ({"array_parallelism": jobs} if jobs else {}))

    def start(self, runs: Sequence[SweepRun], folder: SweepFolder) -> list[Job]:
        """Submits the runs that are not in the queue from an earlier sweep."""
        earlier = {run.name: self._submitted_job(run, folder) for run in runs}
        new = [run for run in runs if not earlier[run.name]]
        pending = [RunInJob(run.command(), str(run.log.absolute()), folder.path.name) for run in new]
        for run in new:
            run.log.unlink(missing_ok=True)
        for run, job in zip(new, self._submit(pending), strict=True):
            folder.record_start(run, job=job.job_id)
            earlier[run.name] = ClusterJob(job, run, folder, time.monotonic())
        return [job for job in earlier.values() if job]

    def _submit(self, pending: Sequence[RunInJob]) -> list[Any]:
        if not pending:
            return []
        with self.executor.batch():
            return [self.executor.submit(work) for work in pending]

    def _submitted_job(self, run: SweepRun, folder: SweepFolder) -> ClusterJob | None:
        """Returns the job of a run that an earlier sweep submitted and that is still in the queue."""
        if not (number := folder.recorded(run, "job")):
            return None
        job = ClusterJob(self.executor.job_class(self.executor.folder, number), run, folder)
        return job if job.is_queued() else None

    def close(self) -> None:
        """Leaves the jobs in the queue."""


def _executor(folder: Path, parameters: dict[str, Any]) -> Any:
    """Returns submitit's executor."""
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            f"--slurm needs submitit ({error}): pip install -r {REPOSITORY / 'requirements-sweep.txt'}"
        ) from error
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=MAX_REQUEUES)
        setup = [f"export PYTHONPATH={shlex.quote(str(REPOSITORY))}:$PYTHONPATH"]
        executor.update_parameters(**{"signal_delay_s": SECONDS_TO_SAVE, "setup": setup, **parameters})
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"--slurm: {error}") from error
    return executor


def parsed_parameters(text: str) -> dict[str, Any]:
    """Returns the parameters of `partition=gpu,gres=gpu:1,time=4:00:00`; submitit counts time in minutes.

    Raises:
        ValueError: a part is not NAME=VALUE, or the time is not in a format of sbatch.
    """
    parameters: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise ValueError(f"expected NAME=VALUE, found {part!r}")
        parameters[name.replace("-", "_")] = int(value) if value.isdecimal() else value
    if isinstance(limit := parameters.get("time"), str):
        parameters["time"] = _minutes(limit)
    return parameters


def _minutes(limit: str) -> int:
    """Returns a time limit as sbatch reads it, rounded up to minutes: 30:00 is half an hour, 1-12 a day and a half."""
    match = TIME_LIMIT.fullmatch(limit)
    if not match:
        raise ValueError(f"expected a time such as 30:00, 4:00:00 or 1-12:00:00, found {limit!r}")
    days, *clock = (int(number or 0) for number in match.groups())
    if match["days"] is None and match["third"] is None:
        clock = [0, *clock[:2]]
    hours, minutes, seconds = clock
    return days * 24 * 60 + hours * 60 + minutes + math.ceil(seconds / 60)
