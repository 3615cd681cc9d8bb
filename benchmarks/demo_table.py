"""Trains and tests every method on the demo data and writes the table of docs/experiments.md.

    sh benchmarks/demo_table.sh

Every row sees the same training and test episodes of its seed, and the same number of them. Two runs go side by
side, a thread each. A finished run is repeated only if its command has changed, so the command can be interrupted; edit
a method, and its runs have to be removed by hand (checkpoints/demo_table).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from run.command import run_command

TABLE = ROOT / "benchmarks" / "results" / "demo_table.md"
DONE = "demo_table.json"
FIXED = "MODEL.ADAPTIVE=false"
HSMR, SPM, PADM = (f"MODEL.{module}.ENABLED=false" for module in ("HSMR", "SPM", "PADM"))


@dataclass(frozen=True)
class Row:
    """One line of the table: what it is called, its config, what is changed in it."""

    name: str
    method: str
    changes: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The name as part of a path."""
        return "".join(letter if letter.isalnum() else "_" for letter in self.name.lower())


ROWS = (
    Row("zero-shot CLIP", "zeroshot"),
    Row("mean-pooled prototypes", "otam", ("MODEL.MATCHER=mean",)),
    Row("Bi-MHM", "otam", ("MODEL.MATCHER=bi-mhm",)),
    Row("OTAM", "otam"),
    Row("TRX", "trx"),
    Row("STRM", "strm"),
    Row("TEAM", "team"),
    Row("CLIP-FSAR", "clipfsar"),
    Row("CPM2C", "cpm2c"),
    Row("A2M2 (our reconstruction)", "a2m2"),
    Row("A2M2, finest scale only (4 x 4 regions)", "a2m2", ("MODEL.MULTI_SCALE=false",)),
    Row("A2M2, coarser scale only (2 x 2 regions)", "a2m2", ("MODEL.SPATIAL_SCALES=[2]",)),
    Row("A2M2, whole frames only", "a2m2", ("MODEL.SPATIAL_SCALES=[1]",)),
    Row("A2M2, fixed alignment", "a2m2", (FIXED,)),
    Row("A2M2, fixed alignment, finest scale only", "a2m2", (FIXED, "MODEL.MULTI_SCALE=false")),
    Row("A2M2, fixed alignment, coarser scale only", "a2m2", (FIXED, "MODEL.SPATIAL_SCALES=[2]")),
    Row("CLIP-MEI", "clipmei"),
    Row("CLIP-SPM", "clipspm"),
    Row("CLIP-SPM without HSMR", "clipspm", (HSMR,)),
    Row("CLIP-SPM without SPM", "clipspm", (SPM,)),
    Row("CLIP-SPM without PADM", "clipspm", (PADM,)),
    Row("CLIP-SPM, HSMR only", "clipspm", (SPM, PADM)),
    Row("CLIP-SPM, SPM only", "clipspm", (HSMR, PADM)),
    Row("CLIP-SPM, PADM only", "clipspm", (HSMR, SPM)),
    Row("CLIP-SPM, no module", "clipspm", (HSMR, SPM, PADM)),
)


def run(row: Row, seed: int, options: argparse.Namespace) -> None:
    """One training and test run in a separate process; its time is stored with its results."""
    directory = options.runs / f"{row.folder}_{seed}"
    episodes = 0 if row.method == "zeroshot" else options.train_episodes
    command = [
        sys.executable, "run/run.py", "--cfg", f"configs/{row.method}/demo.yaml", *row.changes, f"MODEL.SEED={seed}",
        f"TRAIN.TRAIN_EPISODES={episodes}", "TRAIN.VAL_FREQ=0", f"TEST.TEST_EPISODES={options.test_episodes}",
        "DATA.NUM_WORKERS=0", "DATA.CHECK_VIDEOS=false", f"CHECKPOINT.CHECKPOINT_DIR={directory}", *options.changes,
    ]  # fmt: skip
    if is_done(directory, command):
        return
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{finished.stderr}")
    seconds = time.perf_counter() - start
    (directory / DONE).write_text(json.dumps({"command": command[1:], "seconds": seconds}))
    print(f"{seconds:5.0f} s  seed {seed}  {finished.stdout.strip()}", flush=True)


def is_done(directory: Path, command: Sequence[str]) -> bool:
    """Whether a run with just this command is there; one with another command, or unfinished, is moved away."""
    try:
        if json.loads((directory / DONE).read_text())["command"] == list(command[1:]):
            return True
    except (OSError, ValueError, KeyError):
        pass
    if directory.exists():
        directory.rename(directory.with_name(f"{directory.name}.old_{time.time_ns()}"))
    return False


def run_all(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """What is not there yet of all rows and seeds, some runs side by side."""
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda job: run(*job, options), [(row, seed) for seed in options.seeds for row in rows]))


def folders_of(row: Row, options: argparse.Namespace) -> list[Path]:
    """The folders of a row's runs, one for each seed."""
    return [options.runs / f"{row.folder}_{seed}" for seed in options.seeds]


def results_of(row: Row, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What the tests of a row wrote, one for each seed."""
    return [json.loads((folder / "results.json").read_text()) for folder in folders_of(row, options)]


def table(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The Markdown table; accuracy is the mean over the seeds, with their standard deviation."""
    lines = [
        f"5-way 1-shot on the demo's unseen motions, {options.train_episodes} training episodes, "
        f"{options.test_episodes:,} test episodes (the same for all rows), every query judged alone, "
        f"mean ± standard deviation over seeds {', '.join(map(str, options.seeds))}; the interval is the mean 95 % "
        "interval over episodes of one seed.",
        "",
        "| method | accuracy % | interval | trained parameters | seconds per run (1 thread) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        results = results_of(row, options)
        seconds = statistics.mean(
            json.loads((folder / DONE).read_text())["seconds"] for folder in folders_of(row, options)
        )
        accuracies = [result["accuracy"] for result in results]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        interval = statistics.mean(result["interval_95"] for result in results)
        lines.append(
            f"| {row.name} | {statistics.mean(accuracies):.1f} ± {spread:.1f} | ± {interval:.1f} | "
            f"{results[0]['trained_parameters']:,} | {seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def add_options(parser: argparse.ArgumentParser, out: Path, seeds: Sequence[int]) -> None:
    """The options of every script that makes runs of the table; `out` and `seeds` are defaults."""
    parser.add_argument("--runs", type=Path, default=ROOT / "checkpoints" / "demo_table", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=out, help="the table (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--train-episodes", type=int, default=300)
    parser.add_argument("--test-episodes", type=int, default=1000)
    parser.add_argument("--parallel", type=int, default=2, help="runs side by side (default: %(default)s)")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="changes for all rows")


def read_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of `add_options` from the command line; the runs start in the project's own folder."""
    options = parser.parse_intermixed_args()
    options.runs = options.runs.resolve()
    return options


def report(text: str, minutes: float, out: Path) -> None:
    """Writes a table and prints it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"{text}\n{minutes:.1f} minutes; written to {out}")


def main() -> None:
    """Runs what is not there yet and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, TABLE, seeds=(1, 2, 3))
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="NAME", help="only rows whose name contains one of these"
    )
    options = read_options(parser)
    rows = [row for row in ROWS if not options.rows or any(part in row.name for part in options.rows)]
    start = time.perf_counter()
    run_all(rows, options)
    report(table(rows, options), (time.perf_counter() - start) / 60, options.out)


if __name__ == "__main__":
    run_command(main)
