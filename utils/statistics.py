"""Statistics of test answers: accuracy, its intervals, and the difference of two methods.

Two intervals answer two questions. Over episodes: how far would other episodes of the same videos move the mean?
Over videos: how far would other videos of the same classes, and other episodes of them, move it? Neither covers other
classes or other training seeds. docs/evaluation.md explains them, tests/test_statistics.py measures their coverage.

Shapes: E episodes, N ways, K shots, Q queries, V videos of the split.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NORMAL_95 = 1.959964  # two-sided 95 % quantile of the normal distribution
MIN_FREEDOM = 3.0  # below this, the quantile of t depends more on its approximation than on the data
MAX_SUMS = 2**22  # number of sums of signed differences up to which all patterns are counted
DRAWS = 100_000  # random patterns of signs otherwise


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and the degrees of freedom of that error, infinite if the error is exact."""

    mean: float
    error: float
    freedom: float = math.inf

    @property
    def interval(self) -> float:
        """Half the width of the 95 % interval."""
        return self.error * _quantile_of_t(self.freedom)

    @property
    def p_value(self) -> float:
        """The probability of a mean at least this far from zero if the true mean is zero."""
        if self.error == 0:
            return float(self.mean == 0)
        return math.erfc(_as_normal(abs(self.mean) / self.error, self.freedom) / math.sqrt(2))


@dataclass(frozen=True)
class Accuracy:
    """Mean accuracy in percent, and half the width of its 95 % interval over episodes; None for one episode."""

    mean: float
    interval: float | None
    episodes: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} %" if self.interval is None else f"{self.mean:.2f} ± {self.interval:.2f} %"


def accuracy_over_episodes(per_episode: np.ndarray) -> Accuracy:
    """Returns mean and interval over episodes (normal, 1.96 standard errors) of per-episode accuracies.

    Args:
        per_episode: share of right answers in each episode, float [E], in [0, 1].

    Returns:
        accuracy in percent; a single episode has no interval.
    """
    estimate = over_episodes(100 * per_episode[:, None])
    interval = estimate.interval if estimate else None
    return Accuracy(float(100 * per_episode.mean()), interval, len(per_episode))


def over_episodes(values: np.ndarray) -> Estimate | None:
    """Returns the mean of the answers and its error over other episodes of the same videos; None for one episode.

    Args:
        values: one number for each answer, float or bool [E, Q]: whether it is right, or a difference of two methods.
    """
    per_episode = values.mean(axis=1)
    if len(per_episode) < 2:
        return None
    error = per_episode.std(ddof=1) / math.sqrt(len(per_episode))
    return Estimate(float(per_episode.mean()), float(error))


def over_videos(
    values: np.ndarray, support: np.ndarray, query: np.ndarray, class_of_video: np.ndarray
) -> Estimate | None:
    """Returns the mean of the answers and its error over other videos of the same classes and other episodes of them.

    The variance of the mean is that of independent episodes plus the covariance of the episodes that share a video.
    A video v takes part in many of them, as query and as support; x are the deviations of those answers from the mean
    of the class of v in the same role (for a support video all answers of its episode count):

        A_v = sum of x over the answers with v      covariance = sum over v of c (A_v^2 - noise_v) / (E Q)^2

    noise_v is the expected A_v^2 if no answer depended on v: the sum of (1 - 1/n) x^2 as query and (1 - K/n) x^2 as
    support, for n videos of the class. c = n / (n - 1) / s^2 corrects for the class means and for the fact that the
    other K + 1 videos of a class in an episode are drawn from the rest, which reduces A_v by the factor
    s = (n - K - 1) / (n - 1). If few videos cause the errors, the variance is uncertain: its degrees of freedom follow
    from the spread of A_v^2 (Satterthwaite).

    Args:
        values: as for `over_episodes`, [E, Q].
        support: int [E, N, K], video numbers.
        query: int [E, Q], video numbers.
        class_of_video: int [V], with all videos of the split.

    Returns:
        the estimate; None for one episode, or if a class has K + 1 videos or fewer, so that its episodes hardly differ.
    """
    episodes = over_episodes(values)
    shot, videos = support.shape[-1], len(class_of_video)
    size = np.bincount(class_of_video)[class_of_video].astype(np.float64)  # n for each video
    if episodes is None or size.min() <= shot + 1:
        return None

    as_query = _deviations(values, class_of_video[query])
    classes = class_of_video[support[:, :, 0]]
    as_support = _deviations(np.broadcast_to(values.sum(axis=1)[:, None], classes.shape), classes)
    as_support = np.broadcast_to(as_support[..., None], support.shape)
    sums = _by_video(query, as_query, videos) + _by_video(support, as_support, videos)
    noise = (1 - 1 / size) * _by_video(query, as_query**2, videos)
    noise += (1 - shot / size) * _by_video(support, as_support**2, videos)

    scale = size / (size - 1) * ((size - 1) / (size - shot - 1)) ** 2 / values.size**2
    covariance = float((scale * (sums**2 - noise)).sum())
    variance = episodes.error**2 + max(covariance, 0.0)
    squares = scale * sums**2
    uncertainty = float((squares**2).sum() - squares.sum() ** 2 / videos)
    freedom = max(2 * variance**2 / uncertainty, MIN_FREEDOM) if uncertainty > 0 else math.inf
    return Estimate(episodes.mean, math.sqrt(variance), freedom)


def _deviations(values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Returns the values minus the mean of their class; both arrays have the same shape."""
    sums, counts = np.bincount(classes.ravel(), values.ravel()), np.bincount(classes.ravel())
    return values - (sums / np.maximum(counts, 1))[classes]


def _by_video(videos: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Sums the values of each video: float64 [V]."""
    return np.bincount(videos.ravel(), values.ravel(), minlength=count)


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Returns the share of sign patterns for which the mean is at least as far from zero as observed.

    This is an exact permutation test over all patterns. If there are too many, as for more than 22 different
    differences, 100,000 patterns are drawn, the same at each call.

    Args:
        differences: differences of pairs, such as one episode or seed under two methods, float [n].

    Returns:
        the share of the patterns; for n differences at least 2 / 2^n.
    """
    values = np.asarray(differences, dtype=np.float64)
    observed = abs(float(values.sum())) - 1e-9 * len(values)  # the observed pattern counts, also after rounding
    sizes, counts = np.unique(np.abs(values[values != 0]).round(9), return_counts=True)
    sums: np.ndarray = np.zeros(1)
    weights: np.ndarray = np.ones(1)
    for size, count in zip(sizes, counts.tolist(), strict=True):
        heads, share = _coin_flips(count)
        if len(sums) * len(heads) > MAX_SUMS:
            return _drawn_sign_flip_p(np.abs(values), observed)
        steps = size * (2.0 * heads - count)
        sums, which = np.unique(np.add.outer(sums, steps).round(9), return_inverse=True)
        weights = np.bincount(which.ravel(), np.outer(weights, share).ravel())
    return min(1.0, float(weights[np.abs(sums) >= observed].sum()))


def _coin_flips(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of heads in `count` flips and their probabilities, without negligible ones (below 1e-25)."""
    heads = np.arange(count + 1)
    factorial = np.array([math.lgamma(k + 1) for k in range(count + 1)])
    share = np.exp(factorial[-1] - factorial - factorial[::-1] - count * math.log(2))
    return heads[share > 1e-25], share[share > 1e-25]


def _drawn_sign_flip_p(sizes: np.ndarray, observed: float) -> float:
    """Estimates `sign_flip_p` from random patterns of signs, including the observed one."""
    rng, hits, batch = np.random.default_rng(0), 0, 1000
    for _ in range(DRAWS // batch):
        signs = rng.integers(0, 2, size=(batch, len(sizes)), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ sizes) >= observed).sum())
    return (hits + 1) / (DRAWS + 1)


def _as_normal(t: float, freedom: float) -> float:
    """Returns the normal quantile with the probability of the quantile t of Student's distribution (Wallace, 1959)."""
    if math.isinf(freedom):
        return t
    return (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t**2 / freedom))


def _quantile_of_t(freedom: float) -> float:
    """Returns the two-sided 95 % quantile of Student's distribution, the inverse of `_as_normal`."""
    if math.isinf(freedom):
        return NORMAL_95
    z = NORMAL_95 * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(z**2 / freedom))
