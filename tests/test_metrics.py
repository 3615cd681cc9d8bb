"""The accuracy that a paper quotes, against its formula."""

import math

import numpy as np
import pytest

from utils.metrics import accuracy_over_episodes


def test_mean_and_interval_equal_the_formula():
    shares = np.array([0.2, 0.4, 1.0, 0.6])
    accuracy = accuracy_over_episodes(shares)
    mean = sum(shares) / 4
    deviation = math.sqrt(sum((share - mean) ** 2 for share in shares) / 3)
    assert accuracy.mean == pytest.approx(100 * mean)
    assert accuracy.interval == pytest.approx(100 * 1.959964 * deviation / math.sqrt(4))
    assert accuracy.episodes == 4


def test_a_single_episode_claims_no_interval_and_equal_episodes_have_no_spread():
    single = accuracy_over_episodes(np.array([0.4]))
    assert (single.interval, str(single)) == (None, "40.00 %")
    assert accuracy_over_episodes(np.full(10, 0.8)).interval == pytest.approx(0)


def test_two_episodes_have_an_interval():
    accuracy = accuracy_over_episodes(np.array([0.4, 0.6]))
    assert accuracy.interval == pytest.approx(100 * 1.959964 * 0.1)  # deviation 0.1 sqrt(2), divided by sqrt(2)
    assert str(accuracy) == "50.00 ± 19.60 %"


def test_the_interval_covers_the_true_accuracy_in_about_95_of_100_cases():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        accuracy = accuracy_over_episodes(rng.binomial(5, 0.7, size=200) / 5)
        covered += abs(accuracy.mean - 70) <= accuracy.interval
    assert 930 <= covered <= 970
