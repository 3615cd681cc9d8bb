"""Runs on this machine: one process for each run, one GPU for each process."""

import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from run.sweeping.execution import Job
from run.sweeping.folder import SweepFolder
from run.sweeping.plan import SweepRun
from utils.jobs import usable_cores


@dataclass
class LocalJob:
    """A process of a run."""

    process: subprocess.Popen[bytes]

    def exit_code(self) -> int | None:
        """Returns the exit code, None while the process lives."""
        return self.process.poll()

    def stop(self) -> None:
        """Asks the run to save and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)


class LocalMachine:
    """This machine, with room for some runs side by side."""

    def __init__(self, jobs: int, gpus: Sequence[str] = ()) -> None:
        """Takes the number of runs side by side, and the GPUs to hand out, one for each; none leaves all visible."""
        self.jobs, self.gpus = jobs, gpus
        self.started: dict[str, LocalJob] = {}  # by GPU, or by name of the run

    def start(self, run: SweepRun, folder: SweepFolder) -> Job:
        """Starts or resumes a run in a process that outlives this one if that is killed."""
        environment = {"OMP_NUM_THREADS": str(max(1, usable_cores() // self.jobs)), **os.environ}
        environment["WANDB_RUN_GROUP"] = folder.path.name
        free = [gpu for gpu in self.gpus if gpu not in self.started or self.started[gpu].exit_code() is not None]
        if free:
            environment["CUDA_VISIBLE_DEVICES"] = free[0]
        folder.begins(run)
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with open(run.log, "wb") as log:
            job = LocalJob(start_process(run.command(), environment, log))
        self.started[free[0] if free else run.name] = job
        return job

    def leave(self) -> None:
        """Has all runs save and end."""
        for job in self.started.values():
            job.stop()
        for job in self.started.values():
            job.process.wait()


def start_process(command: Sequence[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts a command that prints into a file; Ctrl-C in the terminal reaches only the sweep, which passes it on."""
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
