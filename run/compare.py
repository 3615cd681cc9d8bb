"""Compares test runs that answered the same queries: differences with intervals and p-values, by class and by video.

    python run/compare.py checkpoints/otam_demo checkpoints/clipspm_demo
    python run/compare.py checkpoints/otam_seed* vs checkpoints/clipspm_seed* --html comparison.html

Each run is a run directory or a results.json. Without `vs`, every run is a side of the comparison; with it, the runs
between two `vs` are one method with several seeds. The first side is the baseline of all others.
docs/evaluation.md explains the intervals.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from run.start import start

    start()

from run.command import run_command
from run.comparison import FIELDS, Comparison, Side, load_sides, notes_on
from utils.errors import UserError, counted
from utils.files import raise_if_not_new, write_atomically, writing

VERSUS = "vs"
MAX_VIDEOS = 5  # per side, in the text output


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares the runs and prints the result; PyTorch is imported only to read frames for --html."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, a results.json, or `vs`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, including those of each video")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with frames of the queries that differ")
    options = parser.parse_intermixed_args(arguments)
    raise_if_not_new(options.json, options.html)
    sides = load_sides(grouped(options.runs))
    summary = summarise(sides)
    print("\n".join(format_summary(summary)))
    if options.json:
        _write(options.json, json.dumps(summary, indent=1) + "\n")
    if options.html:
        from run.comparison_page import page

        _write(options.html, page(summary, [Comparison(sides[0], side) for side in sides[1:]]))


def grouped(arguments: Sequence[str]) -> list[list[Path]]:
    """Returns the paths of each side.

    Raises:
        UserError: there are fewer than two sides, or one side of a `vs` is empty.
    """
    groups: list[list[Path]] = [[]]
    for word in arguments:
        if word == VERSUS:
            groups.append([])
        else:
            groups[-1].append(Path(word))
    if VERSUS not in arguments:
        groups = [[path] for path in groups[0]]
    if len(groups) < 2 or not all(groups):
        raise UserError("expected the runs of two methods or more: A B [C ...], or A1 A2 vs B1 B2 [vs ...]")
    return groups


def summarise(sides: Sequence[Side]) -> dict[str, Any]:
    """Returns the whole comparison as plain values; the first side is the baseline."""
    answers, results = sides[0].runs[0].answers, sides[0].runs[0].results
    return {
        "task": {field: results[field] for field in (*FIELDS, "episode_list_sha256")},
        "classes": len(answers.classes),
        "videos": len(answers.videos),
        "sides": [side.summary() for side in sides],
        "notes": notes_on(sides),
        "comparisons": [Comparison(sides[0], side).summary() for side in sides[1:]],
    }


def format_summary(summary: dict[str, Any]) -> list[str]:
    """Formats the comparison as lines of text."""
    lines = [format_task(summary), "", f"   {'accuracy':>10} {'± episodes':>11} {'± videos':>9} {'sd over seeds':>13}"]
    for side in summary["sides"]:
        widths = [side["interval_95"], side["interval_95_videos"], side["standard_deviation_over_runs"]]
        numbers = " ".join(f"{format_number(value):>{width}}" for value, width in zip(widths, (11, 9, 13), strict=True))
        lines.append(f"{side['side']}  {side['accuracy']:8.2f} % {numbers}  {side['label']}: {format_runs(side)}")
    lines += [f"note: {note}" for note in summary["notes"]]
    for comparison in summary["comparisons"]:
        lines += ["", *format_comparison(comparison)]
    return lines


def format_runs(side: dict[str, Any]) -> str:
    """Returns the label of the first run of a side, and how many more runs there are."""
    more = len(side["runs"]) - 1
    return side["runs"][0] + (f" and {more} more" if more else "")


def format_task(summary: dict[str, Any]) -> str:
    """Describes the tested task in one line."""
    task = summary["task"]
    return (
        f"{task['dataset']} {task['way']}-way {task['shot']}-shot, split={task['split']}, protocol={task['protocol']}: "
        f"{counted(task['episodes'], 'episode')} (seed={task['seed']}) of {counted(summary['classes'], 'class')} and "
        f"{counted(summary['videos'], 'video')}"
    )


def format_comparison(comparison: dict[str, Any]) -> list[str]:
    """Formats one pair of sides as lines of text."""
    first, second = comparison["sides"]
    wins, only = comparison["wins"], comparison["only_right"]
    lines = [f"{second} - {first}: {comparison['difference']:+.2f} points"]
    lines += [f"  {name:15} {text}" for name, text in format_differences(comparison)]
    lines += [
        f"  {'classes':15} {first} ahead in {wins[first]}, {second} in {wins[second]}, equal in {wins['equal']}",
        f"  {'queries':15} only {first} right: {only[first]:,}, only {second} right: {only[second]:,}",
        "",
    ]
    width = max(len(row["class"]) for row in comparison["classes"])
    lines.append(f"  {'class':{width}} {first + ' %':>7} {second + ' %':>7} {second + ' - ' + first:>7}")
    for row in comparison["classes"]:
        lines.append(f"  {row['class']:{width}} {row[first]:7.2f} {row[second]:7.2f} {row['difference']:+7.2f}")
    for side in (first, second):
        if videos := comparison["videos"][side][:MAX_VIDEOS]:
            lines += ["", f"  videos that most often only {side} gets right"]
            lines += [
                f"    {row['video']}  in {row['only_right']} of {counted(row['queries'], 'episode')}" for row in videos
            ]
    return lines


def format_differences(comparison: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the uncertainty of a difference for each source: its name and the numbers."""
    rows = [
        ("other episodes", "sign flips of the episodes", comparison["over_episodes"]),
        ("other videos", "of the same classes, in other episodes", comparison["over_videos"]),
    ]
    texts = [
        (name, f"± {format_number(row['interval_95'])}  {format_p(row['p_value'])}  {explanation}")
        for name, explanation, row in rows
        if row["interval_95"] is not None
    ]
    if seeds := comparison["over_seeds"]:
        each = ", ".join(f"{value:+.2f}" for value in seeds["differences"].values())
        pairs = f"sign flips of {len(seeds['differences'])} pairs of seeds"
        pairs = f"{pairs}, smallest possible p: {seeds['least_p_value']:.2g}"
        numbers = f"{each}; standard deviation {seeds['standard_deviation']:.2f}  {format_p(seeds['p_value'])}"
        texts.append(("other seeds", f"{numbers}  {pairs}"))
    return texts


def format_number(value: float | None) -> str:
    """Formats a number with two digits, or a missing one as a dash."""
    return "-" if value is None else f"{value:.2f}"


def format_p(p_value: float) -> str:
    """Formats a p-value with two digits; floating point has no correct digits below 1e-15."""
    return "p < 1e-15" if p_value < 1e-15 else f"p = {p_value:.2g}"


def _write(path: Path, text: str) -> None:
    with writing(path):
        write_atomically(path, text.encode("utf-8", "backslashreplace"))
    print(f"written: {path}")


if __name__ == "__main__":
    run_command(main)
