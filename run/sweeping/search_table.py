"""Writes the results of a search: search.csv and search.md with all trials, and best.yaml, the config of the best."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from run.sweeping.folder import FINISHED, duration
from run.sweeping.plan import DIRECTORY, SweepRun
from run.sweeping.space import as_words, with_values
from run.sweeping.study import Trial
from run.sweeping.sweep_file import Tuned
from utils.config import save_config
from utils.errors import counted
from utils.files import write_atomically, writing
from utils.yaml_text import one_line

NONE = "-"


def write_search(folder: Path, title: str, run: SweepRun, search: Sequence[Tuned], trials: Mapping[int, Trial]) -> None:
    """Writes the tables of a search and, once a trial has finished, the best config.

    Args:
        folder: folder of the search.
        title: title of the sweep.
        run: the tuned run, with its test.
        search: the search space.
        trials: by number.

    Raises:
        UserError: a file cannot be written.
    """
    texts = {"search.csv": _csv(search, trials), "search.md": _markdown(title, run, search, trials)}
    for name, text in texts.items():
        with writing(folder / name):
            write_atomically(folder / name, text.encode())
    if number := best_of(trials):
        note = f"tuned: {counted(len(trials), 'trial')} on validation classes (best: {number})"  # see `Cell.notes`
        info = "; ".join(part for part in (run.config.INFO, note) if part)
        best = with_values(run, {**trials[number].values, "INFO": info, DIRECTORY: str(folder / "best")})
        with writing(folder / "best.yaml"):
            save_config(best.config, folder / "best.yaml")


def best_of(trials: Mapping[int, Trial]) -> int | None:
    """Returns the number of the finished trial with the best validation accuracy, the first one in case of a tie."""
    finished = {number: trial.accuracy for number, trial in trials.items() if trial.state == FINISHED}
    return min(finished, key=lambda number: (-(finished[number] or 0.0), number), default=None)


def _markdown(title: str, run: SweepRun, search: Sequence[Tuned], trials: Mapping[int, Trial]) -> str:
    """Returns all trials, the finished ones first and the best of them on top."""
    best = best_of(trials)
    order = sorted(trials, key=lambda n: (trials[n].state != FINISHED, -(trials[n].accuracy or 0.0), n))
    head = ["trial", "state", "validation accuracy", *(tuned.KEY for tuned in search), "time"]
    lines = [head, ["---"] * len(head)]
    for number in order:
        trial = trials[number]
        accuracy = NONE if trial.accuracy is None else f"{trial.accuracy:.2f}"
        accuracy = f"**{accuracy}**" if number == best else accuracy
        values = [one_line(trial.values[tuned.KEY]).replace("|", "\\|") for tuned in search]
        time = NONE if trial.seconds is None else duration(trial.seconds)
        lines.append([str(number), trial.state or NONE, accuracy, *values, time])
    failed = [f"- trial {number}: {trial.reason.splitlines()[-1]}" for number, trial in trials.items() if trial.reason]
    last = f"Best: trial {best}, {as_words(trials[best].values)}; best.yaml is its config." if best else ""
    return "\n".join([
        f"# Search: {title}", "",
        *(f"| {' | '.join(line)} |" for line in lines), "",
        f"{run.row}, {run.column}, seed {run.seed}. Accuracy in %: the best validation of each trial, on the "
        "validation classes; the test classes were not read. A pruned trial was stopped at a validation behind the "
        "median of the trials that had finished.", "",
        last or "No trial has finished.", "", *(["Failed:", "", *failed, ""] if failed else []),
    ])  # fmt: skip


def _csv(search: Sequence[Tuned], trials: Mapping[int, Trial]) -> str:
    """Returns a line for each trial; its validations are separated by spaces."""
    buffer, keys = io.StringIO(), [tuned.KEY for tuned in search]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["trial", "state", "accuracy", "validations", *keys, "seconds", "reason"])
    for number, trial in sorted(trials.items()):
        values = [one_line(trial.values[key]) for key in keys]
        curve = " ".join(map(str, trial.validations))
        writer.writerow([number, trial.state, trial.accuracy, curve, *values, trial.seconds, trial.reason])
    return buffer.getvalue()
