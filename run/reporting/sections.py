"""Builds the sections that need only the files of a test run: results, curves, classes, confusion."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from run.answers import Answers
from run.reporting import figures, numbers
from run.reporting.page import Drawing, Section, Table
from run.results import stored_in_bf16
from utils.errors import counted
from utils.statistics import Accuracy

SMOOTHED_OVER = 10  # lines of metrics.jsonl
MAX_DIGITS = 16  # digits of a checksum


def result_section(results: Mapping[str, Any]) -> Section:
    """Returns the section with the accuracy under each protocol, and everything that it depends on."""
    rows = [
        (protocol, str(Accuracy(result["accuracy"], result["interval_95"], results["episodes"])), _over_videos(result))
        for protocol, result in results["accuracy_by_protocol"].items()
    ]
    main_row = [row[0] for row in rows].index(results["protocol"])
    intervals = (
        "± is half of the 95 % interval. Over episodes: the change to expect from other episodes of the same videos. "
        "Over videos: the change to expect from other videos of these classes, too. Neither covers other training "
        "seeds."
    )
    return Section(
        "Result",
        [
            Table(("protocol", "accuracy, interval over episodes", "interval over videos"), rows, strong=(main_row,)),
            intervals,
            Table((), [(name, value) for name, value in _dependencies(results).items() if value not in (None, "")]),
        ],
    )


def _over_videos(result: Mapping[str, Any]) -> str:
    """Returns half of the interval over videos as text; empty for too few videos and in older results."""
    half = result.get("interval_95_videos")
    return "" if half is None else f"± {half:.2f} %"


def _dependencies(results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns everything that the accuracy depends on, by name."""
    git = results.get("git") or {}
    code = git.get("commit", "") + (" with uncommitted changes" if git.get("changed") else "")
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items() if version)
    queries = counted(results["query_per_class"], "query")
    task = f"{results['way']}-way {results['shot']}-shot, {queries} of each class"
    return {
        "data set": f"{results['dataset']}, split {results['split']}",
        "task": f"{task}, {counted(results['episodes'], 'episode')}",
        "protocol": results["protocol"],
        "test seed": results["seed"],
        "training seed": results.get("trained_with_seed"),
        "checkpoint": f"{results['checkpoint']}, after {results['checkpoint_episodes']:,} training episodes",
        "checkpoint selected on": results.get("checkpoint_selected_on"),
        "best validation accuracy": _percent(results.get("best_validation_accuracy")),
        "differs from the method's config": ", ".join(results.get("differs_from_default", [])) or "nothing",
        "differs from the training run": "; ".join(results.get("differs_from_training", [])) or "nothing",
        "notes on the split": "; ".join(results.get("split_notes", [])),
        "unreadable training clips": len(results.get("bad_clips", [])) or None,
        "features kept in bf16": ", ".join(stored_in_bf16(results)).lower() or None,
        "trained parameters": f"{results['trained_parameters']:,}",
        "device": results.get("device"),
        "duration of the test run": f"{results['test_seconds']:,.0f} s" if "test_seconds" in results else None,
        "code": code,
        "versions": versions,
        "SHA-256 of the episodes": results["episode_list_sha256"][:MAX_DIGITS] + "…",
        "SHA-256 of the split": results["split_sha256"][:MAX_DIGITS] + "…",
        "SHA-256 of the checkpoint": results["checkpoint_sha256"][:MAX_DIGITS] + "…",
        "note": results.get("info"),
    }


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f} %"


def curves_section(metrics: Sequence[Mapping[str, float]]) -> Section:
    """Returns the section with losses and accuracies over the training episodes."""
    losses = {name: _line(metrics, name) for name in sorted({n for line in metrics for n in line})}
    losses = {_loss_name(name): line for name, line in losses.items() if name.startswith("train/loss")}
    accuracies = {}
    x, y = _line(metrics, "train/accuracy")
    if len(x):
        accuracies["training"] = x, numbers.moving_average(y, SMOOTHED_OVER)
    validation = _line(metrics, "val/accuracy")
    caption = f"The training accuracy is the mean of the last {SMOOTHED_OVER} logged values."
    if len(validation[0]):
        accuracies["validation"] = validation
        best = int(validation[1].argmax())
        caption += f" Best validation: {validation[1][best]:.2f} % after {validation[0][best]:,.0f} episodes."
    panels = {"loss": losses, "accuracy (%)": accuracies}
    panels = {title: lines for title, lines in panels.items() if lines}
    rows = [
        (title, name, int(episode), value)
        for title, lines in panels.items()
        for name, line in lines.items()
        for episode, value in zip(*line, strict=True)
    ]
    data = Table(("panel", "line", "episode", "value"), rows)
    return Section("Learning curves", [Drawing("learning_curves", figures.curves(panels), caption, data)])


def _loss_name(name: str) -> str:
    return "sum" if name == "train/loss" else name.removeprefix("train/loss_").replace("_", " ")


def _line(metrics: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the episodes and values of one number."""
    values = [(line["episode"], line[name]) for line in metrics if name in line]
    return np.array([x for x, _ in values], dtype=float), np.array([y for _, y in values], dtype=float)


def classes_section(answers: Answers, results: Mapping[str, Any]) -> Section:
    """Returns the section with the accuracy of each class and its interval."""
    rows = numbers.class_accuracies(answers, results["protocol"])
    caption = (
        "Percentage of correct answers for each class, the hardest class first, with 95 % intervals. They "
        "include how much the query videos of the class differ, but not the choice of support videos."
    )
    data = Table(
        ("class", "accuracy", "low", "high", "queries", "query videos"),
        [(r.name, f"{r.accuracy:.3f}", f"{r.low:.3f}", f"{r.high:.3f}", r.queries, r.videos) for r in rows],
    )
    drawn = figures.class_accuracy(rows, 100 / results["way"])
    return Section("Accuracy per class", [Drawing("class_accuracy", drawn, caption, data)])


def confusion_section(answers: Answers, confusion: numbers.Confusion) -> Section:
    """Returns the section with the confusion matrix."""
    names = [str(answers.classes[number]) for number in confusion.classes]
    caption = (
        "Percentage of the queries of the row's class that were classified as the column's class, among those whose "
        "episode contained the column's class. Rows add up to more than 100 %, since an episode has only some of the "
        "classes. Classes that are confused with each other are neighbours."
    )
    given, rates = confusion.given, confusion.rates
    rows = [
        (names[row], names[column], int(given[row, column]), int(choices), f"{rates[row, column]:.3f}")
        for (row, column), choices in np.ndenumerate(confusion.choices)
        if choices
    ]
    data = Table(("true class", "answer", "answers", "queries with this choice", "percent"), rows)
    drawn = figures.confusion_matrix(confusion, names)
    return Section("Confusion matrix", [Drawing("confusion", drawn, caption, data)])
