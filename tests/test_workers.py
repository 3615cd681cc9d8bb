"""The processes that read videos survive a signal to the whole run and always end with the main process."""

import os
import signal
import subprocess
import sys

from episodes.dataset import ClipReader, set_up_worker
from episodes.splits import load_splits
from tests.helpers.episodes import CPU, OPTIONS
from tests.helpers.shipped import ROOT

# Signals the workers like a scheduler, continues reading, and exits with an active iterator.
READER = """
import multiprocessing, os, signal, time
from torch.utils.data import DataLoader
from episodes.dataset import set_up_worker

loader = DataLoader(list(range(50)), batch_size=None, num_workers=2, worker_init_fn=set_up_worker)
items = iter(loader)
next(items)
workers = [process.pid for process in multiprocessing.active_children()]
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    for pid in workers:
        sender = os.fork()  # the signal of a parent is obeyed, so another process sends it
        if sender == 0:
            os.kill(pid, number)
            os._exit(0)
        os.waitpid(sender, 0)
print(len(workers), sum(1 for _ in zip(range(40), items)), all(os.path.exists(f"/proc/{pid}") for pid in workers))
"""


def test_workers_ignore_signals_and_end_with_the_parent():
    command = [sys.executable, "-c", READER]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert finished.stderr == ""
    assert (finished.returncode, finished.stdout) == (0, "2 40 True\n")


def test_a_signal_during_worker_start_up_is_ignored(tiny_dataset, monkeypatch):
    def signal_and_set_up(worker: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        set_up_worker(worker)

    monkeypatch.setattr("episodes.dataset.set_up_worker", signal_and_set_up)
    index = load_splits(tiny_dataset.splits, tiny_dataset.videos, ["test"])["test"]
    assert len(list(ClipReader(OPTIONS, 1).loader(index, [0, 1], 1, CPU))) == 2
