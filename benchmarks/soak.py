"""Trains the demo for thousands of steps and shows that memory, file handles and step time stay flat.

    python benchmarks/soak.py --steps 3000 --out benchmarks/results/soak.txt

One episode per step, with workers, log lines, validations and checkpoints. At every log line it records the resident
memory of the main process and of its workers, the open file handles and threads, and the time of a step. The first
quarter is warm-up; a line is fitted to the rest of each figure. Memory, handles and threads are flat if the line rises
by less than 5 % of the mean; the time of a step depends on other load on the machine, and may rise by 25 %.
The exit code is 1 if any of them is not flat. Reads /proc, so it needs Linux.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from benchmarks.machine import machine
from run.command import run_command
from run.main_run import Learner
from run.recording import Recorder
from utils.config import load_config

MEGABYTE = 1e6
WARM_UP = 0.25
MAX_RISE = {"milliseconds_per_step": 0.25}
MAX_RISE_ELSE = 0.05
LINES_SHOWN = 20


@dataclass(frozen=True)
class Sample:
    """The measured values after a number of steps; memory in 10^6 bytes."""

    steps: int
    main_megabytes: float
    workers_megabytes: float
    handles: int
    threads: int
    milliseconds_per_step: float


class Sampler:
    """Logs training as `Recorder.log_training` does, and adds a sample at every log line."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.log = Recorder.log_training

    def __call__(self, recorder: Recorder) -> None:
        state = recorder.state
        episodes, seconds = state.meter.episodes, state.meter.elapsed()
        self.log(recorder)
        workers = [process.pid for process in multiprocessing.active_children()]
        self.samples.append(
            Sample(
                state.episode,
                resident_megabytes(os.getpid()),
                sum(resident_megabytes(pid) for pid in workers if pid),
                len(os.listdir("/proc/self/fd")),
                threading.active_count(),
                1000 * seconds / episodes,
            )
        )


def resident_megabytes(process: int) -> float:
    """Returns the resident memory of a process, including shared pages."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


def rise(values: np.ndarray) -> float:
    """Returns the rise of a fitted line from the first to the last value, as a fraction of the mean."""
    slope = np.polyfit(np.arange(len(values)), values, 1)[0]
    return float(slope * (len(values) - 1) / max(values.mean(), 1e-9))


def verdicts(samples: list[Sample]) -> dict[str, tuple[float, bool]]:
    """Returns for each measured value its rise after the warm-up, and whether it is flat."""
    steady = np.array([astuple(sample) for sample in samples[int(WARM_UP * len(samples)) :]], dtype=float)
    verdicts = {}
    for column, field in enumerate(fields(Sample)):
        if field.name != "steps":
            grown = rise(steady[:, column])
            verdicts[field.name] = grown, grown < MAX_RISE.get(field.name, MAX_RISE_ELSE)
    return verdicts


def table(samples: list[Sample]) -> str:
    """Returns some evenly spaced samples, and the verdict on each measured value."""
    names = [field.name for field in fields(Sample)]
    shown = samples[:: max(1, len(samples) // LINES_SHOWN)]
    lines = ["  ".join(names)]
    lines += ["  ".join(f"{value:{len(n)}.0f}" for n, value in zip(names, astuple(s), strict=True)) for s in shown]
    lines.append("")
    for name, (grown, is_flat) in verdicts(samples).items():
        lines.append(f"{name}: rises by {100 * grown:+.1f} % after the warm-up, {'flat' if is_flat else 'NOT FLAT'}")
    return "\n".join(lines)


def soak(steps: int, workers: int, overrides: list[str]) -> list[Sample]:
    """Trains in a directory that is deleted afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    every = max(1, steps // 100)
    small = [
        "MODEL.SEED=1", f"TRAIN.TRAIN_EPISODES={steps}", "TRAIN.TASKS_PER_BATCH=1", f"TRAIN.PRINT_FREQ={every}",
        f"TRAIN.VAL_FREQ={10 * every}", "TRAIN.VAL_EPISODES=20", f"CHECKPOINT.SAVE_FREQ={every}",
        f"DATA.NUM_WORKERS={workers}", f"CHECKPOINT.CHECKPOINT_DIR={folder / 'run'}",
    ]  # fmt: skip
    try:
        sampler = Sampler()
        with mock.patch.object(Recorder, "log_training", lambda recorder: sampler(recorder)):  # as a method
            Learner(load_config(ROOT / "configs/clipspm/demo.yaml", [*small, *overrides]).config).train()
    finally:
        shutil.rmtree(folder)
    return sampler.samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--workers", type=int, default=2, help="DataLoader workers")
    parser.add_argument("--out", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change a value of the config")
    options = parser.parse_args()
    heading = f"{options.steps:,} steps with {options.workers} workers. Machine: {machine()}."
    samples = soak(options.steps, options.workers, options.overrides)
    text = f"{heading}\n\n{table(samples)}\n"
    print(text, end="")
    if options.out:
        Path(options.out).write_text(text, encoding="utf-8")
    if not all(is_flat for _, is_flat in verdicts(samples).values()):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
