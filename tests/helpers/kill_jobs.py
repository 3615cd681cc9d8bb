"""Job of test_kill.py: trains a run repeatedly in child processes that are killed at random times.

python tests/helpers/kill_jobs.py config.yaml folder kills

PyTorch is loaded and the Learner built once, in the parent; each child continues from there like a fresh process.
"""

import json
import os
import random
import select
import signal
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from run.main_run import Learner
from run.run_directory import RunDirectory
from utils.config import load_config


def main(config_file: str, folder: Path, kills: int) -> None:
    """Trains the uninterrupted run `whole`, then runs cut_0, cut_1, ... until `kills` children were killed.

    Writes into killed.json how often each of these runs was killed; each was trained to its end afterwards.
    """
    torch.set_num_threads(1)
    learner = Learner(load_config(config_file).config)
    begun = time.monotonic()
    if not train_in_child(learner, folder / "whole", None):
        sys.exit("the uninterrupted run failed")
    longest = (time.monotonic() - begun) / 3
    times = random.Random(7)
    killed = [0]
    while sum(killed) < kills:
        if train_in_child(learner, folder / f"cut_{len(killed) - 1}", times.uniform(0, longest)):
            killed.append(0)  # this one was faster than the signal: the next starts again
        else:
            killed[-1] += 1
    train_in_child(learner, folder / f"cut_{len(killed) - 1}", None)
    (folder / "killed.json").write_text(json.dumps(killed), encoding="utf-8")


def train_in_child(learner: Learner, directory: Path, seconds: float | None) -> bool:
    """Trains in a child that is killed after a delay, if any; returns True if it finished."""
    is_begun, begin = os.pipe()
    child = os.fork()
    if child == 0:
        train_and_exit(learner, directory, begin)
    os.close(begin)
    os.read(is_begun, 1)
    if seconds is not None:
        select.select([is_begun], [], [], seconds)  # ends earlier when the child does, since that closes the pipe
        os.kill(child, signal.SIGKILL)
    os.close(is_begun)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        sys.exit(f"{directory}: a child failed, see above")
    return status == 0


def train_and_exit(learner: Learner, directory: Path, begin: int) -> None:
    """Trains in `directory`, in the child, from its last checkpoint if there is one."""
    try:
        checkpoints = learner.config.CHECKPOINT.model_copy(
            update={"CHECKPOINT_DIR": str(directory), "RESUME_FROM_CHECKPOINT": True}
        )
        learner.config = learner.config.model_copy(update={"CHECKPOINT": checkpoints})
        learner.directory = RunDirectory(learner.config, learner.directory.data)
        os.write(begin, b".")
        learner.train()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
