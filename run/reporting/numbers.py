"""Computes the numbers of a report from the answers of a test run.

Shapes: E episodes, N ways, Q queries, C classes.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from run.answers import Answers

NORMAL_95 = 1.96


@dataclass(frozen=True)
class Confusion:
    """How often queries of each class (rows) were classified as each class (columns), in the order of `classes`.

    classes: positions in `Answers.classes` of the classes with queries. given, choices: int64 [C, C], queries of the
    row's class that were classified as the column's class, and those whose episode contained the column's class.
    """

    classes: np.ndarray
    given: np.ndarray
    choices: np.ndarray

    @property
    def rates(self) -> np.ndarray:
        """`given` as a percentage of `choices`, float64 [C, C]; NaN where no query had the choice."""
        with np.errstate(invalid="ignore"):
            return np.where(self.choices > 0, 100 * self.given / self.choices, np.nan)


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy of one class in percent with its 95 % interval, over `queries` answers for `videos` query videos."""

    name: str
    accuracy: float
    low: float
    high: float
    queries: int
    videos: int


@dataclass(frozen=True)
class ConfusedPair:
    """Queries of class `true` were answered `chosen` in `wrong` of `choices` cases; positions in `Answers.classes`."""

    true: int
    chosen: int
    wrong: int
    choices: int

    @property
    def rate(self) -> float:
        """The percentage of the queries that had the choice."""
        return 100 * self.wrong / self.choices


def confusion(answers: Answers, protocol: str) -> Confusion:
    """Counts the answers; classes that are often confused become neighbours."""
    total = len(answers.classes)
    true, chosen = answers.true_classes(), answers.chosen_classes(protocol)
    given, choices = np.zeros((2, total, total), dtype=np.int64)
    np.add.at(given, (true.ravel(), chosen.ravel()), 1)
    among = np.broadcast_to(answers.class_ids[:, None, :], (*true.shape, answers.class_ids.shape[1]))
    np.add.at(choices, (np.broadcast_to(true[..., None], among.shape).ravel(), among.ravel()), 1)
    present = np.flatnonzero(np.diag(choices))
    counted = Confusion(present, given[np.ix_(present, present)], choices[np.ix_(present, present)])
    order = _neighbours(counted.rates)
    return Confusion(present[order], counted.given[np.ix_(order, order)], counted.choices[np.ix_(order, order)])


def _neighbours(rates: np.ndarray) -> np.ndarray:
    """Returns an order from hierarchical clustering that puts often confused classes together: int64 [C]."""
    if len(rates) < 3:
        return np.arange(len(rates))
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    both = np.nan_to_num(rates) + np.nan_to_num(rates).T
    np.fill_diagonal(both, 0)
    distances = both.max() - both
    np.fill_diagonal(distances, 0)
    return leaves_list(linkage(squareform(distances), "average", optimal_ordering=True))


def class_accuracies(answers: Answers, protocol: str) -> list[ClassAccuracy]:
    """Returns the accuracy of each class with queries, the hardest first.

    A video is a query in many episodes, and its answers are similar. The interval is therefore Wilson's for the number
    of independent answers that would vary as much as the query videos do.
    """
    is_right, true = answers.is_right(protocol), answers.true_classes()
    rows = []
    for number in np.unique(true):
        is_class = true == number
        videos, position = np.unique(answers.query[is_class], return_inverse=True)
        query_counts = np.bincount(position)
        right = np.bincount(position, weights=is_right[is_class])
        rate = right.sum() / query_counts.sum()
        low, high = wilson(rate, independent_answers(right, query_counts))
        name, queries = str(answers.classes[number]), int(query_counts.sum())
        rows.append(ClassAccuracy(name, 100 * rate, 100 * low, 100 * high, queries, len(videos)))
    return sorted(rows, key=lambda row: row.accuracy)


def independent_answers(right: np.ndarray, query_counts: np.ndarray) -> float:
    """Returns how many independent answers would vary as much as the accuracy of grouped answers.

    Args:
        right, query_counts: number of right answers and of all answers for each group (query video).

    Returns:
        between 1 and the number of answers; the number of groups if all answers are right or all are wrong.
    """
    groups, total = len(query_counts), query_counts.sum()
    rate = right.sum() / total
    if rate in (0, 1) or groups == 1:
        return float(groups)
    variance = groups / (groups - 1) * np.square(right - rate * query_counts).sum() / total**2
    return float(total) if variance == 0 else float(np.clip(rate * (1 - rate) / variance, 1, total))


def wilson(rate: float, number: float) -> tuple[float, float]:
    """Returns the bounds of Wilson's 95 % interval for a rate of `number` independent answers."""
    square = NORMAL_95**2 / number
    middle = (rate + square / 2) / (1 + square)
    half = sqrt(square * (rate * (1 - rate) + square / 4)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def most_confused(matrix: Confusion, number: int) -> list[ConfusedPair]:
    """Returns the pairs of classes with the highest rate of confusion, by the lower bound of its interval."""
    classes = matrix.classes.tolist()
    pairs = [
        ConfusedPair(classes[row], classes[column], int(wrong), int(matrix.choices[row, column]))
        for (row, column), wrong in np.ndenumerate(matrix.given)
        if wrong and row != column
    ]
    pairs.sort(key=lambda pair: -wilson(pair.wrong / pair.choices, pair.choices)[0])
    return pairs[:number]


def clearest_mistakes(answers: Answers, protocol: str, pairs: list[ConfusedPair]) -> list[tuple[int, int]]:
    """Returns (episode, query) for each pair: the wrong answer with the largest lead, of a video not shown before."""
    scores, labels = answers.scores[protocol], answers.labels
    true_scores = np.take_along_axis(scores, labels[..., None], axis=2)[..., 0]
    lead = scores.max(axis=-1) - true_scores
    true, chosen = answers.true_classes(), answers.chosen_classes(protocol)
    shown: set[int] = set()
    mistakes = []
    for pair in pairs:
        places = np.argwhere((true == pair.true) & (chosen == pair.chosen))
        places = places[np.argsort(-lead[tuple(places.T)], kind="stable")]
        fresh = [place for place in places if int(answers.query[tuple(place)]) not in shown]
        episode, query = (int(i) for i in (fresh[0] if fresh else places[0]))
        shown.add(int(answers.query[episode, query]))
        mistakes.append((episode, query))
    return mistakes


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the mean of the last `window` values at each position, fewer at the beginning: float64, same length."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    begin = np.maximum(0, np.arange(1, len(values) + 1) - window)
    return (sums[1:] - sums[begin]) / (np.arange(1, len(values) + 1) - begin)


def same_class_neighbours(features: np.ndarray, classes: np.ndarray) -> float:
    """Returns the percentage of videos whose nearest neighbour by cosine has the same class: float [V, D], int [V]."""
    units = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    similarity = units @ units.T
    np.fill_diagonal(similarity, -np.inf)
    return 100 * float((classes[similarity.argmax(axis=1)] == classes).mean())
