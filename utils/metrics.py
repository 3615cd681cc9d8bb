"""Accuracy over episodes, with what one needs to quote it."""

from dataclasses import dataclass

import numpy as np

NORMAL_95 = 1.959964  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Accuracy:
    """Mean accuracy in percent and the half width of its 95 % confidence interval over episodes."""

    mean: float
    interval: float
    episodes: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.interval:.2f} %"


def accuracy_over_episodes(per_episode: np.ndarray) -> Accuracy:
    """Mean and interval (normal, 1.96 standard errors) of per-episode accuracies.

    The interval measures how far other episodes of the same videos would move the mean. Episodes share videos,
    so it says nothing of other videos or other training seeds.

    Args:
        per_episode: share of right answers in each episode, float [E], in [0, 1].

    Returns:
        in percent; the interval is 0 for a single episode.
    """
    episodes = len(per_episode)
    spread = per_episode.std(ddof=1) if episodes > 1 else 0.0
    interval = NORMAL_95 * spread / np.sqrt(episodes)
    return Accuracy(float(100 * per_episode.mean()), float(100 * interval), episodes)
