"""The accuracy that a paper quotes and its intervals, against formulas and by simulation."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest

from utils import statistics
from utils.statistics import DRAWS, Estimate, accuracy_over_episodes, over_episodes, over_videos, sign_flip_p


def test_mean_and_interval_equal_the_formula():
    shares = np.array([0.2, 0.4, 1.0, 0.6])
    accuracy = accuracy_over_episodes(shares)
    mean = sum(shares) / 4
    deviation = math.sqrt(sum((share - mean) ** 2 for share in shares) / 3)
    assert accuracy.mean == pytest.approx(100 * mean)
    assert accuracy.interval == pytest.approx(100 * 1.959964 * deviation / math.sqrt(4))
    assert accuracy.episodes == 4


def test_one_episode_has_no_interval_and_equal_episodes_have_zero_width():
    single = accuracy_over_episodes(np.array([0.4]))
    assert (single.interval, str(single)) == (None, "40.00 %")
    assert accuracy_over_episodes(np.full(10, 0.8)).interval == pytest.approx(0)


def test_two_episodes_have_an_interval():
    accuracy = accuracy_over_episodes(np.array([0.4, 0.6]))
    assert accuracy.interval == pytest.approx(100 * 1.959964 * 0.1)  # deviation 0.1 sqrt(2), divided by sqrt(2)
    assert str(accuracy) == "50.00 ± 19.60 %"


def test_the_interval_has_95_percent_coverage():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        accuracy = accuracy_over_episodes(rng.binomial(5, 0.7, size=200) / 5)
        covered += abs(accuracy.mean - 70) <= accuracy.interval
    assert 930 <= covered <= 970


# Other videos of the same classes

DIMENSIONS = 4


@dataclass(frozen=True)
class Population:
    """Classes with unlimited videos, from which test runs draw; a nearest-neighbour method classifies them.

    Videos are points around the centre of their class, some far from it: those are hard queries and bad supports.
    """

    classes: int
    videos: int
    shot: int
    spread: float
    episodes: int
    compared: bool = False  # a second method, which receives the same points stretched

    def centres(self) -> np.ndarray:
        return 1.5 * np.random.default_rng(0).standard_normal((self.classes, 1, DIMENSIONS))

    def test(self, rng: np.random.Generator, videos: int, episodes: int) -> tuple[np.ndarray, ...]:
        """Draws videos and 5-way episodes of them: values [E, 5], support [E, 5, K], query [E, 5], class [V]."""
        scale = self.spread * rng.lognormal(0, 0.6, (self.classes, videos, 1))
        points = self.centres() + scale * rng.standard_normal((self.classes, videos, DIMENSIONS))
        points = points.reshape(-1, DIMENSIONS)
        classes = rng.random((episodes, self.classes)).argsort(axis=1)[:, :5]
        chosen = rng.random((episodes, 5, videos)).argpartition(self.shot, axis=2)[:, :, : self.shot + 1]
        chosen = chosen + videos * classes[..., None]
        support, query = chosen[..., : self.shot], chosen[..., self.shot]
        values = self.is_right(points, support, query)
        if self.compared:
            values = values - self.is_right(points * np.linspace(0.3, 1.3, DIMENSIONS), support, query)
        return values, support, query, np.repeat(np.arange(self.classes), videos)

    @staticmethod
    def is_right(points: np.ndarray, support: np.ndarray, query: np.ndarray) -> np.ndarray:
        distances = ((points[query][:, :, None] - points[support].mean(axis=2)[:, None]) ** 2).sum(axis=-1)
        return (distances.argmin(axis=-1) == np.arange(5)).astype(float)

    def truth(self) -> float:
        """Returns the mean over all videos and episodes, from many."""
        rng = np.random.default_rng(1)
        return float(np.mean([self.test(rng, 100, 2000)[0].mean() for _ in range(40)]))


@pytest.mark.parametrize(
    "population",
    [
        Population(classes=10, videos=12, shot=1, spread=0.5, episodes=400),
        Population(classes=10, videos=20, shot=5, spread=1.0, episodes=300),
        Population(classes=24, videos=30, shot=1, spread=0.4, episodes=500),
        Population(classes=10, videos=12, shot=1, spread=0.7, episodes=400, compared=True),
    ],
    ids=["1-shot", "5-shot", "24 classes", "difference of two methods"],
)
def test_the_interval_over_videos_has_95_percent_coverage(population):
    """Redraws the videos of fixed classes, and episodes of them; the truth is the mean over all such tests."""
    rng, truth, tests = np.random.default_rng(2), population.truth(), 600
    covered = np.zeros(2)
    for _ in range(tests):
        values, *videos = population.test(rng, population.videos, population.episodes)
        estimates = over_videos(values, *videos), over_episodes(values)
        covered += [abs(estimate.mean - truth) <= estimate.interval for estimate in estimates]
    over_new_videos, over_new_episodes = 100 * covered / tests
    print(
        f"mean {100 * truth:.1f} %: the interval over videos covers it in {over_new_videos:.1f} % of the tests, "
        f"the usual interval over episodes in {over_new_episodes:.1f} %"
    )
    assert 93 <= over_new_videos <= 97
    assert over_new_episodes < 90


def test_without_video_effects_both_intervals_agree():
    rng = np.random.default_rng(0)
    _, *videos = Population(classes=10, videos=50, shot=1, spread=0.5, episodes=1).test(rng, 50, 4000)
    ratios = []
    for _ in range(20):
        values = rng.binomial(1, 0.7, size=(4000, 5)).astype(float)
        ratios.append(over_videos(values, *videos).error / over_episodes(values).error)
    assert min(ratios) >= 1  # a negative covariance estimate counts as zero
    assert np.mean(ratios) < 1.15


def test_the_interval_over_videos_does_not_depend_on_order():
    rng = np.random.default_rng(0)
    values, support, query, class_of_video = Population(5, 12, 2, 0.7, 1).test(rng, 12, 200)
    expected = over_videos(values, support, query, class_of_video)
    episodes, queries, names = rng.permutation(200), rng.permutation(5), rng.permutation(60)
    renamed = np.empty(60, dtype=int)
    renamed[names] = class_of_video
    found = over_videos(
        values[episodes][:, queries], names[support][episodes][:, :, ::-1], names[query][episodes][:, queries], renamed
    )
    assert found.error == pytest.approx(expected.error)
    assert found.freedom == pytest.approx(expected.freedom)


def test_episodes_of_almost_all_videos_have_no_interval_over_videos():
    values, *videos = Population(5, 6, 5, 1.0, 1).test(np.random.default_rng(0), 6, 50)
    assert over_videos(values, *videos) is None
    assert over_videos(values[:1], *(part[:1] for part in videos[:2]), videos[2]) is None


# p-values


@pytest.mark.parametrize("freedom", [3, 5, 10, 30])
def test_t_quantiles_equal_the_table(freedom):
    table = {3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042}
    assert Estimate(0.0, 1.0, freedom).interval == pytest.approx(table[freedom], rel=0.02)


@pytest.mark.parametrize("freedom", [3.0, 12.0, math.inf])
def test_p_values_are_below_5_percent_outside_the_interval(freedom):
    edge = Estimate(0.0, 2.0, freedom).interval
    assert Estimate(edge, 2.0, freedom).p_value == pytest.approx(0.05, rel=1e-4)
    assert Estimate(-1.1 * edge, 2.0, freedom).p_value < 0.05 < Estimate(0.9 * edge, 2.0, freedom).p_value
    assert [Estimate(mean, 0.0, freedom).p_value for mean in (0.0, 0.1)] == [1.0, 0.0]


@pytest.mark.parametrize(
    "differences",
    [[1, 2, 3], [0.3, -0.1, 0.4, 0.0, 2.5, -1.0], [1, 1, 1, -2, 0], [0, 0], [0.25], [1 / 3] * 10, [5 / 3, 1 / 3, -2]],
)
def test_sign_flip_p_values_equal_full_enumeration(differences):
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [sum(sign * value for sign, value in zip(pattern, differences, strict=True)) for pattern in patterns]
    at_least_as_large = sum(abs(total) >= abs(sum(differences)) - 1e-9 for total in sums)
    assert sign_flip_p(differences) == pytest.approx(at_least_as_large / len(patterns))


def test_sign_flip_p_values_of_many_episodes_are_exact():
    """All of one size: the p-value of the sign test, a sum of binomial probabilities."""
    differences = [1] * 1030 + [-1] * 970 + [0] * 500
    tail = sum(math.comb(2000, k) for k in range(1030, 2001))
    assert sign_flip_p(differences) == pytest.approx(2 * tail / 2**2000)


@pytest.fixture
def _drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws patterns of signs without counting sums first until there are too many."""
    monkeypatch.setattr(statistics, "MAX_SUMS", 1000)


@pytest.mark.usefixtures("_drawn")
def test_random_sign_flips_agree_with_the_normal_distribution():
    differences = np.random.default_rng(0).normal(0.1, 1, size=60)
    expected = math.erfc(abs(differences.sum()) / np.sqrt((differences**2).sum()) / math.sqrt(2))
    assert (first := sign_flip_p(differences)) == pytest.approx(expected, rel=0.2)
    assert sign_flip_p(differences) == first


@pytest.mark.usefixtures("_drawn")
def test_a_sampled_p_value_is_never_zero():
    differences = 100 + np.random.default_rng(0).normal(0, 1, size=60)  # no drawn pattern is as extreme
    assert sign_flip_p(differences) == pytest.approx(1 / (DRAWS + 1))
