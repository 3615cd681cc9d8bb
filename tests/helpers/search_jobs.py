"""Replaces run/run.py in test_sweep_search.py: a training run whose validations depend on the learning rate.

python tests/helpers/search_jobs.py <run directory> <episodes> <learning rate> <seconds between validations>

It validates after every second episode, resumes after the last one, and ends on SIGTERM as a run does. A learning rate
above 0.05 ends with an error.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from filelock import FileLock


def main(directory: Path, episodes: int, rate: float, seconds: float) -> int:
    """Returns the exit code of the run."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(75))
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / "run.lock", timeout=0):
        (directory / "checkpoint_last.pt").touch()
        if rate > 0.05:
            print("first line\nerror: the loss is nan")
            return 2
        metrics = directory / "metrics.jsonl"
        done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        for number in range(done + 1, episodes // 2 + 1):
            accuracy = 60 - 10 * abs(math.log10(rate) + 3) + number  # best at 1e-3
            with open(metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps({"episode": 2 * number, "val/accuracy": accuracy}) + "\n")
            time.sleep(seconds)
        return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
