"""Running means of a training run, without a host synchronisation per episode."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from models.base import EpisodeOutput
from utils import distributed

Item = TypeVar("Item")


class Meter:
    """Sums losses, accuracy and times between two log lines; the sums stay on the device until `take`.

    Several processes each sum over their own episodes, and put the sums together in `take`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.episodes = 0
        self.wait = 0.0
        self.paused = 0.0
        self.start = time.perf_counter()

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with the time spent waiting for each counted."""
        iterator = iter(items)
        while True:
            before = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.wait += time.perf_counter() - before
            yield item

    def add(self, output: EpisodeOutput, query_labels: Tensor) -> None:
        """Counts one training episode: its losses and the share of its queries answered rightly."""
        right = (output.scores.detach().argmax(dim=-1) == query_labels).float().mean()
        values = {"loss": output.total, **{f"loss_{k}": v for k, v in output.losses.items()}, "accuracy": 100 * right}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.episodes += 1

    def pause(self, seconds: float) -> None:
        """Takes time that was not spent training (validation, saving) out of the rate."""
        self.paused += seconds

    def take(self) -> dict[str, float]:
        """Means since the last call: losses, accuracy in %, episodes/s, share of time waiting, peak memory in GB.

        All processes call this together; the means are over all their episodes, the memory is that of this one's GPU.
        """
        own = {name: total.item() for name, total in self.sums.items()}
        totals = _added(distributed.gather({"episodes": self.episodes, "wait": self.wait, **own}))
        episodes, wait = totals.pop("episodes"), totals.pop("wait") / distributed.world_size()
        values = {name: total / episodes for name, total in totals.items()}
        elapsed = time.perf_counter() - self.start - self.paused
        values["episodes_per_second"] = episodes / elapsed
        values["data_wait_percent"] = 100 * wait / elapsed
        if self.device.type == "cuda":
            values["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self._clear()
        return values


def _added(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Sums by name; a process that had no episode since the last time has no losses to add."""
    totals: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals
