"""Accuracy over episodes, with what one needs to quote it."""

from dataclasses import dataclass

import numpy as np

NORMAL_95 = 1.959964  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Accuracy:
    """Mean accuracy in percent and the half width of its 95 % interval over episodes, which one episode has not."""

    mean: float
    interval: float | None
    episodes: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} %" if self.interval is None else f"{self.mean:.2f} ± {self.interval:.2f} %"


def accuracy_over_episodes(per_episode: np.ndarray) -> Accuracy:
    """Mean and interval (normal, 1.96 standard errors) of per-episode accuracies.

    The interval measures how far other episodes of the same videos would move the mean. Episodes share videos,
    so it says nothing of other videos or other training seeds.

    Args:
        per_episode: share of right answers in each episode, float [E], in [0, 1].

    Returns:
        in percent; a single episode has no interval.
    """
    episodes, mean = len(per_episode), float(100 * per_episode.mean())
    if episodes < 2:
        return Accuracy(mean, None, episodes)
    interval = 100 * NORMAL_95 * per_episode.std(ddof=1) / np.sqrt(episodes)
    return Accuracy(mean, float(interval), episodes)
