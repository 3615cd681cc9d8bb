"""Writes report.html with the figures and numbers of a test run, beside its results.

    python run/report.py checkpoints/clipspm_demo
    python run/report.py checkpoints/clipspm_demo/results_2.json DATA.DATA_DIR=/new/place/of/the/videos

The page is self-contained and opens offline; a folder beside it contains each figure as PNG, SVG and CSV.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from run.start import start

    start()

from run.command import number, run_command
from run.requirements import missing
from utils.errors import UserError

if TYPE_CHECKING:
    from run.answers import Answers
    from run.reporting.page import Section
    from utils.schema import Config

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements-report.txt"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, imports PyTorch and the packages for figures, and writes a report."""
    options = parse_arguments(arguments)
    raise_if_packages_are_missing()
    if options.out and options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is not a folder; name a folder, which is created if it does not exist")
    run = TestRun.read(options.run)

    from run.reporting.figures import style
    from run.reporting.page import write_report
    from utils.logs import set_up_logging

    set_up_logging()
    with style():
        sections, notes, line = build(run, options.overrides, options.mistakes, options.videos)
        title = f"{run.results['label']} on {run.results['dataset']}"
        page = write_report(options.out or run.directory, title, line, sections, notes)
    print("\n".join([*(f"missing: {note}" for note in notes), f"report: {page}"]), flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory (its newest results), or a results.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: the run directory)")
    parser.add_argument(
        "--mistakes", type=number(int, 0), default=6, metavar="N",
        help="confused pairs of classes to show with frames (default: 6)",
    )  # fmt: skip
    parser.add_argument(
        "--videos", type=number(int, 0), default=400, metavar="N",
        help="largest number of videos for t-SNE and means (default: 400)",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="change a value of the config")
    return parser.parse_intermixed_args(arguments)


def raise_if_packages_are_missing() -> None:
    """Raises UserError if the packages for figures are not installed."""
    if problems := missing([str(REQUIREMENTS)]):
        raise UserError(f"a report needs more packages ({'; '.join(problems)}): pip install -r {REQUIREMENTS}")


@dataclass(frozen=True)
class TestRun:
    """The files of a test run: its directory, results.json and answers.npz, and metrics.jsonl of the training run."""

    directory: Path
    results: dict[str, Any]
    answers: "Answers"
    metrics: list[dict[str, float]]

    @classmethod
    def read(cls, place: Path) -> "TestRun":
        """Reads the newest results of a run directory, or a results.json.

        Raises:
            UserError: the results are missing, unreadable or without answers.
        """
        from run.results_file import REPORTED, read_results

        path = newest_results(place) if place.is_dir() else place
        results, answers = read_results(path, REPORTED)

        from run.metrics_log import METRICS, read_metrics

        folders = (path.parent, Path(results["checkpoint"]).parent)
        metrics = next((folder / METRICS for folder in folders if (folder / METRICS).is_file()), None)
        return cls(path.parent, results, answers, read_metrics(metrics) if metrics else [])


def newest_results(directory: Path) -> Path:
    """Returns the path of results.json, or of the results_N.json with the highest number."""
    files = [path for path in directory.glob("results*.json") if path.stem == "results" or _number(path)]
    return max(files, key=_number, default=directory / "results.json")


def _number(path: Path) -> int:
    number = path.stem.removeprefix("results_")
    return int(number) if number.isdecimal() else 0


def build(
    run: TestRun, overrides: Sequence[str], mistakes: int, max_videos: int
) -> tuple[list["Section"], list[str], str]:
    """Returns the sections of the report, notes on missing parts, and the result line."""
    from run.reporting import model_sections, numbers, sections
    from run.results import result_line
    from utils.config import config_from_dict

    results, answers = run.results, run.answers
    protocol, notes = results["protocol"], model_sections.Notes()
    config: Config = config_from_dict(results["config"], "the config in the results", overrides=overrides)
    videos, model = model_sections.videos_and_model(config, results, answers, run.directory, notes)
    confusion = numbers.confusion(answers, protocol)
    pairs = numbers.most_confused(confusion, mistakes)
    parts = [sections.result_section(results)]
    if run.metrics:
        parts.append(sections.curves_section(run.metrics))
    else:
        notes.append("no learning curves: nothing was trained, or metrics.jsonl is missing")
    parts += [sections.classes_section(answers, results), sections.confusion_section(answers, confusion)]
    parts.append(model_sections.mistakes_section(answers, protocol, pairs, videos, model, notes))
    if videos and model and max_videos:
        split_parts = notes.attempt(
            "no features", lambda: model_sections.split_sections(model, videos, answers, confusion.classes, max_videos)
        )
        parts += split_parts or []
    return parts, notes, result_line(config, results)


if __name__ == "__main__":
    run_command(main)
