"""Replaces run/run.py in test_sweep.py: locks the run directory, waits, writes a stored result.

python tests/helpers/sweep_jobs.py <run directory> <folder of a finished run> <seconds>

A run in a directory named "fails..." ends with an error and "is_stopped..." as by SIGTERM, both unless the folder
contains a file `repaired`; "writes_nothing..." ends well without a result. SIGTERM ends a run like a real one.
Every start is logged in begun.txt of the folder, every end in ended.txt, with GPU and time.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

from filelock import FileLock


def note(file: Path, directory: Path) -> None:
    with open(file, "a", encoding="utf-8") as opened:
        opened.write(f"{directory.name} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')} {time.time()}\n")


def main(directory: Path, finished: Path, seconds: float) -> int:
    """Returns the exit code of the run."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(75))
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / "run.lock", timeout=0):
        note(finished / "begun.txt", directory)
        (directory / "checkpoint_last.pt").touch()
        time.sleep(seconds)
        if directory.name.startswith("fails") and not (finished / "repaired").exists():
            print("first line\nerror: the disk is on fire")
            return 2
        if directory.name.startswith("is_stopped") and not (finished / "repaired").exists():
            return 75
        if directory.name.startswith("writes_nothing"):
            return 0
        for name in ("answers.npz", "results.json"):
            shutil.copy(finished / name, directory / f".{name}.part")
            os.replace(directory / f".{name}.part", directory / name)
        note(finished / "ended.txt", directory)
        return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])))
