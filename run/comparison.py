"""Compares the answers of two methods to the same queries: differences, intervals and p-values, by class and video.

A side is one method: one run, or several runs with different seeds. The answers of several runs are averaged.
Shapes: E episodes, Q queries, C classes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from run.answers import Answers
from run.results_file import COMPARED, read_results
from utils.errors import UserError
from utils.statistics import Estimate, over_episodes, over_videos, sign_flip_p

# Results field that two runs must have in common -> what sets it.
FIELDS = {
    "dataset": "DATA.DATASET",
    "split": "the split",
    "way": "TEST.WAY",
    "shot": "TEST.SHOT",
    "query_per_class": "TEST.QUERY_PER_CLASS",
    "episodes": "TEST.TEST_EPISODES",
    "seed": "TEST.SEED",
    "protocol": "TEST.PROTOCOL",
}
# These differ if any of the fields above does, so they are compared after them.
DIGESTS = {"split_sha256": "the videos or the classes of the split", "episode_list_sha256": "the episodes"}
# Field that may differ, which the comparison then mentions -> its value in older results without the field.
NOTED_FIELDS = {"checkpoint_selected_on": None, "data_report_sha256": None, "features_stored_in": "float32"}


@dataclass(frozen=True)
class Run:
    """The results of one test run: results.json with its path, and answers.npz."""

    path: Path
    results: dict[str, Any]
    answers: Answers

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Reads a run directory or a results.json.

        Raises:
            UserError: there are no results or several, or they are damaged.
        """
        if path.is_dir():
            files = sorted(path.glob("results*.json"))
            if len(files) > 1:
                raise UserError(f"{path} contains {', '.join(file.name for file in files)}; use one of these files")
            path = files[0] if files else path / "results.json"
        return cls(path, *read_results(path, COMPARED))

    @cached_property
    def is_right(self) -> np.ndarray:
        """Whether each query was answered correctly, bool [E, Q]."""
        return self.answers.is_right(self.results["protocol"])

    @property
    def scores(self) -> np.ndarray:
        """The scores of each query under the run's protocol, float [E, Q, N]."""
        return self.answers.scores[self.results["protocol"]]

    @property
    def seed(self) -> int | None:
        """The seed of the training run, or None if unknown."""
        return self.results.get("trained_with_seed")


@dataclass(frozen=True)
class Side:
    """One method: its letter and its runs."""

    letter: str
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """The method with its non-default settings."""
        return ", ".join([self.runs[0].results["label"], *self.runs[0].results.get("differs_from_default", [])])

    @cached_property
    def right(self) -> np.ndarray:
        """In how many runs each query was answered correctly, int64 [E, Q]."""
        return np.sum([run.is_right for run in self.runs], axis=0)

    @property
    def percent(self) -> np.ndarray:
        """The percentage of the runs that answered each query correctly, float64 [E, Q]."""
        return 100 * self.right / len(self.runs)

    @property
    def accuracies(self) -> list[float]:
        """The accuracy of each run in percent."""
        return [100 * float(run.is_right.mean()) for run in self.runs]

    def summary(self) -> dict[str, Any]:
        """Returns accuracy and intervals, as plain values."""
        answers = self.runs[0].answers
        return {
            "side": self.letter,
            "label": self.label,
            "runs": [str(run.path) for run in self.runs],
            "trained_with_seeds": [run.seed for run in self.runs],
            "accuracy": float(self.percent.mean()),
            "accuracy_of_each_run": self.accuracies,
            "standard_deviation_over_runs": float(np.std(self.accuracies, ddof=1)) if len(self.runs) > 1 else None,
            "interval_95": interval_of(over_episodes(self.percent)),
            "interval_95_videos": interval_of(answers.over_videos(self.percent)),
        }


@dataclass(frozen=True)
class Pool:
    """One value per answer, from several runs whose test episodes may differ: float64 [E, Q].

    Runs with the same episodes are averaged. Other episodes are added as further episodes of the same videos.
    """

    values: np.ndarray
    support: np.ndarray
    query: np.ndarray
    class_of_video: np.ndarray

    @classmethod
    def of(cls, runs: Sequence[Run], values: Sequence[np.ndarray]) -> "Pool":
        """Pools values, one [E, Q] per run; all runs use the same split."""
        groups: dict[str, list[int]] = {}
        for number, run in enumerate(runs):
            groups.setdefault(run.results["episode_list_sha256"], []).append(number)
        answers = [runs[numbers[0]].answers for numbers in groups.values()]
        return cls(
            np.concatenate([np.mean([values[n] for n in numbers], axis=0) for numbers in groups.values()]),
            np.concatenate([part.support for part in answers]),
            np.concatenate([part.query for part in answers]),
            answers[0].class_of_video(),
        )

    def over_episodes(self) -> Estimate | None:
        """Returns the mean and its error over other episodes of the same videos."""
        return over_episodes(self.values)

    def over_videos(self) -> Estimate | None:
        """Returns the mean and its error over other videos of the same classes, and other episodes of them."""
        return over_videos(self.values, self.support, self.query, self.class_of_video)


def load_sides(paths: Sequence[Sequence[Path]]) -> list[Side]:
    """Reads the runs of each side.

    Raises:
        UserError: the runs differ in episodes, split or protocol, or the runs of a side are not of the same method.
    """
    sides = [Side(chr(ord("A") + i), tuple(Run.load(path) for path in group)) for i, group in enumerate(paths)]
    first = sides[0].runs[0]
    for side in sides:
        for run in side.runs:
            raise_if_incomparable(first, run)
            if run.results["label"] != side.runs[0].results["label"]:
                raise UserError(
                    f"the runs of side {side.letter} are of two methods: {side.runs[0].path} of "
                    f"{side.runs[0].results['label']}, {run.path} of {run.results['label']}; put `vs` between methods"
                )
    return sides


def raise_if_incomparable(first: Run, other: Run) -> None:
    """Raises UserError with the differing fields unless both runs answered the same queries under one protocol."""
    differing = [field for field in FIELDS if first.results[field] != other.results[field]]
    if differing:
        values = "; ".join(f"{field} is {first.results[field]} and {other.results[field]}" for field in differing)
        keys = ", ".join(FIELDS[field] for field in differing)
        raise UserError(
            f"{first.path} and {other.path} are results of different tasks: {values}; test with the same {keys}"
        )
    for field, content in DIGESTS.items():
        if first.results[field] != other.results[field]:
            raise UserError(
                f"{first.path} and {other.path} are results of different tasks: {content} differ ({field}); test both "
                f"on the same data"
            )


def have_same_scores(pairs: Iterable[tuple[Run, Run]]) -> bool:
    """Returns whether both runs of every pair gave each query exactly the same scores: their settings do not matter."""
    return all(np.array_equal(first.scores, second.scores) for first, second in pairs)


def notes_on(sides: Sequence[Side]) -> list[str]:
    """Returns a sentence for each difference between the runs that still allows a comparison, and for equal scores."""
    first, *others = sides
    equal = [other for other in others if len(other.runs) == len(first.runs)]
    notes = [
        f"{first.letter} and {other.letter} gave every query the same scores: what differs between them has no effect"
        for other in equal
        if have_same_scores(zip(first.runs, other.runs, strict=True))
    ]
    for field, default in NOTED_FIELDS.items():
        values = {side.letter: sorted({str(run.results.get(field, default)) for run in side.runs}) for side in sides}
        if len({tuple(value) for value in values.values()}) > 1:
            found = ", ".join(f"{letter}: {' and '.join(value)}" for letter, value in values.items())
            notes.append(f"{field} differs ({found})")
    return notes


@dataclass(frozen=True)
class Comparison:
    """The comparison of two sides; differences are second - first, in percent."""

    first: Side
    second: Side

    @cached_property
    def differences(self) -> np.ndarray:
        """The difference for each query, float64 [E, Q]."""
        return self.second.percent - self.first.percent

    def only_right(self, side: Side) -> np.ndarray:
        """Returns which queries every run of one side and no run of the other answers correctly, bool [E, Q]."""
        other = self.second if side is self.first else self.first
        return (side.right == len(side.runs)) & (other.right == 0)

    def episodes_p(self) -> float:
        """Returns the p-value of exact sign flips of the episodes' differences, counted in whole answers."""
        first_runs, second_runs = len(self.first.runs), len(self.second.runs)
        return sign_flip_p((self.second.right * first_runs - self.first.right * second_runs).sum(axis=1))

    def seed_differences(self) -> dict[int, float] | None:
        """Returns the differences of runs with equal seeds; None unless both sides have the same seeds, two or more."""
        first, second = (
            {run.seed: accuracy for run, accuracy in zip(side.runs, side.accuracies, strict=True)}
            for side in (self.first, self.second)
        )
        sizes = {len(self.first.runs), len(self.second.runs), len(first), len(second)}
        if first.keys() != second.keys() or None in first or len(sizes) > 1 or sizes == {1}:
            return None
        return {seed: second[seed] - first[seed] for seed in sorted(seed for seed in first if seed is not None)}

    def classes(self) -> list[dict[str, Any]]:
        """Returns the accuracy of both sides for each class, in descending order of the first side's lead."""
        answers = self.first.runs[0].answers
        true, count = answers.true_classes().ravel(), len(answers.classes)
        query_counts = np.bincount(true, minlength=count)
        sums = [np.bincount(true, side.percent.ravel(), minlength=count) for side in (self.first, self.second)]
        rows = [
            {
                "class": str(answers.classes[c]),
                "queries": int(query_counts[c]),
                self.first.letter: float(sums[0][c] / query_counts[c]),
                self.second.letter: float(sums[1][c] / query_counts[c]),
                "difference": float((sums[1][c] - sums[0][c]) / query_counts[c]),
            }
            for c in np.flatnonzero(query_counts)
        ]
        return sorted(rows, key=lambda row: row["difference"])

    def videos(self, side: Side) -> list[dict[str, Any]]:
        """Returns the query videos that only this side gets right in some episode, most such queries first."""
        answers, only = self.first.runs[0].answers, self.only_right(side)
        query_counts = np.bincount(answers.query.ravel(), minlength=len(answers.videos))
        count = np.bincount(answers.query[only], minlength=len(answers.videos))
        order = sorted(np.flatnonzero(count).tolist(), key=lambda video: (-count[video], answers.videos[video]))
        return [
            {"video": str(answers.videos[video]), "only_right": int(count[video]), "queries": int(query_counts[video])}
            for video in order
        ]

    def summary(self) -> dict[str, Any]:
        """Returns all results of the comparison as plain values."""
        by_seed = self.seed_differences()
        video_estimate = self.first.runs[0].answers.over_videos(self.differences)
        classes = self.classes()
        return {
            "sides": [self.first.letter, self.second.letter],
            "difference": float(self.differences.mean()),
            "over_episodes": {
                "interval_95": interval_of(over_episodes(self.differences)),
                "p_value": self.episodes_p(),
            },
            "over_videos": {
                "interval_95": interval_of(video_estimate),
                "p_value": video_estimate.p_value if video_estimate else None,
            },
            "over_seeds": by_seed
            and {
                "differences": by_seed,
                "standard_deviation": float(np.std(list(by_seed.values()), ddof=1)),
                "p_value": sign_flip_p(list(by_seed.values())),
                "least_p_value": 2 / 2 ** len(by_seed),
            },
            "wins": {
                self.first.letter: sum(row["difference"] < -1e-9 for row in classes),
                self.second.letter: sum(row["difference"] > 1e-9 for row in classes),
                "equal": sum(math.isclose(row["difference"], 0, abs_tol=1e-9) for row in classes),
            },
            "classes": classes,
            "only_right": {side.letter: int(self.only_right(side).sum()) for side in (self.first, self.second)},
            "videos": {side.letter: self.videos(side) for side in (self.first, self.second)},
        }


def interval_of(estimate: Estimate | None) -> float | None:
    """Returns half the width of the 95 % interval, or None without an estimate."""
    return estimate.interval if estimate else None
