"""Does each part of A2M2 help on the demo data? Rows of the demo table that differ in one part, over many seeds.

    python benchmarks/a2m2_parts.py

One seed says little about a difference of half a point, since another seed changes a run by more. The seeds of two rows
are therefore compared in pairs: same classes, same order of training and the same test episodes. Runs that the demo
table made already count here too, and the other way round (checkpoints/demo_table).
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.demo_table import ROWS, TABLE, add_options, read_options, report, results_of, run_all
from run.command import run_command
from utils.statistics import sign_flip_p

MOST_SEEDS = 20  # whose 2^20 patterns of signs are counted in a moment
OUT = TABLE.with_name("a2m2_parts.md")
BOTH, FINE, COARSE = "two scales of regions", "4 x 4 regions only", "2 x 2 regions only"
ROW_OF = {  # scales -> the rows with adaptive and with fixed alignment
    BOTH: ("A2M2 (our reconstruction)", "A2M2, fixed alignment"),
    FINE: ("A2M2, finest scale only (4 x 4 regions)", "A2M2, fixed alignment, finest scale only"),
    COARSE: ("A2M2, coarser scale only (2 x 2 regions)", "A2M2, fixed alignment, coarser scale only"),
}


@dataclass(frozen=True)
class Comparison:
    """Two rows that differ in one part: what they have in common, then the two variants, each with its row."""

    part: str
    common: str
    first: tuple[str, str]
    second: tuple[str, str]


COMPARISONS = (
    *(Comparison("A2", scales, ("adaptive", rows[0]), ("fixed", rows[1])) for scales, rows in ROW_OF.items()),
    *(
        Comparison("M2", f"{name} alignment", (BOTH, ROW_OF[BOTH][alignment]), (scales, ROW_OF[scales][alignment]))
        for alignment, name in ((1, "fixed"), (0, "adaptive"))
        for scales in (FINE, COARSE)
    ),
)


def table(accuracies: dict[str, list[float]], options: argparse.Namespace) -> str:
    """The Markdown table; accuracies in percent, for each row's name those of the seeds."""
    seeds = options.seeds
    lines = [
        f"5-way 1-shot on the demo's unseen motions, {options.train_episodes} training episodes, "
        f"{options.test_episodes:,} test episodes, every query judged alone; accuracy in % as mean over seeds "
        f"{seeds[0]} to {seeds[-1]}, difference as mean ± standard error over the pairs of runs with the same seed.",
        "",
        "| part | in common | with the part | its fixed counterpart | difference | ahead | by chance |",
        "|---|---|---|---|---|---|---|",
    ]
    for comparison in COMPARISONS:
        first, second = (np.array(accuracies[row]) for _, row in (comparison.first, comparison.second))
        differences = first - second
        error = differences.std(ddof=1) / len(differences) ** 0.5
        lines.append(
            f"| {comparison.part} | {comparison.common} | {comparison.first[0]}: {first.mean():.2f} | "
            f"{comparison.second[0]}: {second.mean():.2f} | {differences.mean():+.2f} ± {error:.2f} | "
            f"{(differences > 0).sum()} of {len(seeds)} | {sign_flip_p(differences):.3f} |"
        )
    lines += [
        "",
        "*By chance*: how often the mean difference would be as far from zero if the sign of each pair's were drawn by "
        "lot (all patterns of signs counted, both sides).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is not there yet and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, OUT, seeds=range(1, 9))
    options = read_options(parser)
    if not 2 <= len(options.seeds) <= MOST_SEEDS:
        parser.error(f"--seeds needs 2 to {MOST_SEEDS} seeds, found {len(options.seeds)}; a difference needs a spread")
    names = {name for rows in ROW_OF.values() for name in rows}
    rows = [row for row in ROWS if row.name in names]
    start = time.perf_counter()
    run_all(rows, options)
    accuracies = {row.name: [result["accuracy"] for result in results_of(row, options)] for row in rows}
    report(table(accuracies, options), (time.perf_counter() - start) / 60, options.out)


if __name__ == "__main__":
    run_command(main)
