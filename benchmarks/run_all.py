"""Runs the benchmarks whose two sides take turns and writes their output to one file: all ratios in under 20 minutes.

python benchmarks/run_all.py
python benchmarks/run_all.py --only protocols start_up

Each benchmark is a process of one thread, at settings that are shorter than the defaults. A benchmark that fails is
reported, and the others run.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from run.command import run_command

OUT = ROOT / "benchmarks" / "results" / "all.txt"
FEW_VIDEOS = "--literal-episodes 1 --measure-videos 30 --score-episodes 20 --repeats 2"
COMMANDS = {
    "matching": "matching.py --repeats 30",
    "trx": "trx.py --repeats 2",
    "a2m2_scales": "a2m2_scales.py --repeats 5",
    "parity": "parity.py --fixtures tests/fixtures/released --method clipspm",
    "loading": "loading.py --episodes 10 --stores",
    "protocols": "protocols.py --repeats 3",
    "batch_episodes": "batch_episodes.py --sizes 50 --episodes 50 --repeats 2",
    "training": "training.py --sections loop literal --frames 4 --episodes 2 --repeats 1",
    "start_up": "start_up.py",
    "evaluation_rn50": f"evaluation.py --backbone RN50 {FEW_VIDEOS}",
    "evaluation_vit": f"evaluation.py --backbone ViT-B/16 {FEW_VIDEOS}",
}


def main() -> int:
    """Runs the benchmarks; returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--out", type=Path, default=OUT, help="file for the output")
    options = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started, failed = time.monotonic(), []
    with open(options.out, "w", encoding="utf-8") as file:
        for name in options.only:
            before, words = time.monotonic(), COMMANDS[name].split()
            finished = subprocess.run(
                [sys.executable, f"benchmarks/{words[0]}", *words[1:]],
                cwd=ROOT, env=environment, capture_output=True, text=True,
            )  # fmt: skip
            text = finished.stdout
            if finished.returncode:
                failed.append(name)
                text += finished.stderr
            seconds = time.monotonic() - before
            block = f"$ python benchmarks/{COMMANDS[name]}\n{text.rstrip()}\n({seconds:.0f} s)\n\n"
            print(block, end="", flush=True)
            file.write(block)
        end = f"all: {(time.monotonic() - started) / 60:.1f} minutes; failed: {', '.join(failed) or 'none'}\n"
        print(end, end="")
        file.write(end)
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
