"""Starts runs on this machine: one process per run, one GPU per process."""

import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from run.sweeping.execution import Job
from run.sweeping.folder import SweepFolder, try_lock
from run.sweeping.plan import SweepRun
from run.sweeping.process import start_process
from utils.errors import UserError
from utils.jobs import usable_cores


@dataclass
class LocalJob:
    """A process of a run."""

    process: subprocess.Popen[bytes]

    def exit_code(self) -> int | None:
        """Returns the exit code, None before the process ends."""
        return self.process.poll()

    def stop(self) -> None:
        """Asks the run to save and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)


def raise_if_gpus_are_missing(gpus: Sequence[str]) -> None:
    """Raises UserError if this machine does not have the GPUs; the runs would use the CPU without a warning."""
    import torch

    count = torch.cuda.device_count()
    is_numbered = "CUDA_VISIBLE_DEVICES" not in os.environ  # otherwise PyTorch counts only the visible ones
    if not count or any(is_numbered and gpu.isdecimal() and int(gpu) >= count for gpu in gpus):
        raise UserError(
            f"--gpus {','.join(gpus)}: PyTorch sees {count} GPUs on this machine; name only these, counted from 0, "
            "or leave --gpus out"
        )


class LocalMachine:
    """This machine, which may run several runs at a time."""

    poll_seconds = 0.2

    def __init__(self, jobs: int, gpus: Sequence[str] = ()) -> None:
        """Stores the number of runs at a time, and the GPUs, one for each run; without GPUs, each run sees all GPUs."""
        self.jobs, self.gpus = jobs, gpus
        self.started: dict[str, LocalJob] = {}  # by GPU, or by name of the run

    def start(self, runs: Sequence[SweepRun], folder: SweepFolder) -> list[Job]:
        """Starts or resumes each run in a process that continues if this one is killed."""
        return [self._start(run, folder) for run in runs]

    def _start(self, run: SweepRun, folder: SweepFolder) -> Job:
        environment = {"OMP_NUM_THREADS": str(max(1, usable_cores() // self.jobs)), **os.environ}
        environment["WANDB_RUN_GROUP"] = folder.path.name
        free = [gpu for gpu in self.gpus if gpu not in self.started or self.started[gpu].exit_code() is not None]
        if free:
            environment["CUDA_VISIBLE_DEVICES"] = free[0]
        folder.record_start(run)
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with open(run.log, "wb") as log:
            try_lock(log)
            job = LocalJob(start_process(run.command(), environment, log))
        self.started[free[0] if free else run.name] = job
        return job

    def close(self) -> None:
        """Stops all runs, and returns when they have saved."""
        for job in self.started.values():
            job.stop()
        for job in self.started.values():
            job.process.wait()
