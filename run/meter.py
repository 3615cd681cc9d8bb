"""Running means of a training run, computed without waiting for the device at every episode."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.base import EpisodeOutput
from utils import distributed

Item = TypeVar("Item")


class Meter:
    """Sums losses, accuracy and times between two log lines; the sums stay on the device until `take`.

    Each process sums over its episodes; `take` adds the sums of all processes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.episodes = 0
        self.waits: list[tuple[Any, Any]] = []
        self.wait_before = 0.0  # from the process that this one resumes
        self.paused = 0.0
        self.pause_start: float | None = None
        self.start = time.perf_counter()

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items, and measures how long the device waits for each.

        While the host waits for data, a GPU still works through its queue. Its idle time is therefore the time between
        two GPU events around the wait. `take` reads the events when the queue is empty.
        """
        iterator = iter(items)
        while True:
            before = self._mark()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waits.append((before, self._mark()))
            yield item

    def _mark(self) -> float | torch.cuda.Event:
        """Returns the time in seconds, or an event in the queue of the GPU."""
        if self.device.type != "cuda":
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def add(self, output: EpisodeOutput, query_labels: Tensor) -> None:
        """Adds the losses and the accuracy of one training episode."""
        right = (output.scores.detach().argmax(dim=-1) == query_labels).float().mean()
        values = {"loss": output.total, **{f"loss_{k}": v for k, v in output.losses.items()}, "accuracy": 100 * right}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.episodes += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time of this block (validation, saving) from the speed; waits for the device first."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.pause_start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - self.pause_start
        self.pause_start = None

    def state(self) -> list[dict[str, float]]:
        """Returns the sums since the last `take`, one entry per process; all processes call this together."""
        sums = {name: total.item() for name, total in self.sums.items()}
        times = {"wait": self._local_wait(), "elapsed": self.elapsed()}
        return distributed.gather({"episodes": self.episodes, **times, **sums})

    def restore(self, state: list[dict[str, float]]) -> None:
        """Restores a result of `state`, for any number of processes."""
        own = _added(state[distributed.rank() :: distributed.world_size()])
        self.episodes = int(own.pop("episodes", 0))
        # Losses add up over the processes, times do not, since all processes trained during the same time.
        for name in ("wait", "elapsed"):
            own.pop(name, None)
        self.wait_before = sum(process["wait"] for process in state) / len(state)
        self.start = time.perf_counter() - max(process["elapsed"] for process in state)
        self.sums = {name: torch.tensor(total, device=self.device) for name, total in own.items()}

    def elapsed(self) -> float:
        """Returns the seconds of training since the last `take`."""
        now = time.perf_counter() if self.pause_start is None else self.pause_start
        return now - self.start - self.paused

    def _local_wait(self) -> float:
        """Returns the seconds that this process waited for data; the queue of a GPU must be empty."""
        return self.wait_before + sum(_seconds(before, after) for before, after in self.waits)

    def take(self) -> dict[str, float]:
        """Returns the means since the last call: losses, accuracy in %, episodes/s, waiting time in %; peak GPU memory.

        All processes call this together, and the means cover the episodes of all processes. The peak memory is that
        of this process on its GPU since its start, including validations.
        """
        own = {name: total.item() for name, total in self.sums.items()}  # from here on the queue is empty
        totals = _added(distributed.gather({"episodes": self.episodes, "wait": self._local_wait(), **own}))
        episodes, wait = totals.pop("episodes"), totals.pop("wait") / distributed.world_size()
        values = {name: total / episodes for name, total in totals.items()}
        elapsed = self.elapsed()
        values["episodes_per_second"] = episodes / elapsed
        values["data_wait_percent"] = 100 * wait / elapsed
        if self.device.type == "cuda":
            values["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self._clear()
        return values


def rate(episodes_per_second: float) -> str:
    """Returns a speed as text: episodes per second, or seconds per episode if that is below one."""
    if 0 < episodes_per_second < 1:
        return f"{1 / episodes_per_second:.2f} s/episode"
    return f"{episodes_per_second:.2f} episodes/s"


def _seconds(before: Any, after: Any) -> float:
    """Returns the seconds between two results of `_mark`."""
    return before.elapsed_time(after) / 1000 if isinstance(before, torch.cuda.Event) else after - before


def _added(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Returns the sums by name; a process without an episode since the last `take` has no losses."""
    totals: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals
