"""The process of a run, and the cluster job around it.

This module does not import PyTorch, so that jobs start quickly."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any


@dataclass
class RunInJob:
    """A cluster job. submitit sends it to the node, and calls `checkpoint` before the time limit ends."""

    command: Sequence[str]
    log: str
    group: str
    seconds: float = 0.0  # seconds of earlier attempts
    process: "subprocess.Popen[bytes] | None" = field(default=None, compare=False)
    started: float = 0.0

    def __call__(self) -> tuple[int, float]:
        """Runs the command until it ends; returns its exit code and the seconds of all attempts."""
        self.started = time.monotonic()
        os.makedirs(os.path.dirname(self.log), exist_ok=True)
        with open(self.log, "ab") as log:
            environment = {**os.environ, "WANDB_RUN_GROUP": self.group}
            # SLURM sends its signal to every process of the job; `checkpoint` asks the run to save.
            with children_ignore(signal.SIGUSR2):
                self.process = start_process(self.command, environment, log)
        return self.process.wait(), self.seconds + time.monotonic() - self.started

    def checkpoint(self) -> Any:
        """Stops the run, which saves, and returns the submission that resumes it; called by a signal handler."""
        import submitit

        if self.process:
            self.process.send_signal(signal.SIGTERM)
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # the handler has interrupted `wait`
        seconds = self.seconds + time.monotonic() - self.started
        return submitit.core.utils.DelayedSubmission(RunInJob(self.command, self.log, self.group, seconds))


@contextmanager
def children_ignore(number: int) -> Iterator[None]:
    """Ignores a signal within this block; processes started in the block ignore it until they end."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


def start_process(command: Sequence[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts a command with its output in a file; Ctrl-C in the terminal reaches only the sweep, which forwards it."""
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
