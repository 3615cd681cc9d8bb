"""The numbers of a log line: means over the episodes since the last line, in the units of their names."""

from collections.abc import Iterator

import pytest
import torch

from models.base import EpisodeOutput
from run import meter as meter_module
from run.meter import Meter

CPU = torch.device("cpu")


def output_of(right: int, loss: float) -> EpisodeOutput:
    """Returns the output for four queries with label 0, of which the first `right` score highest for class 0."""
    scores = torch.tensor([[1.0, 0.0]] * right + [[0.0, 1.0]] * (4 - right))
    return EpisodeOutput(scores[None], {"cross_entropy": torch.tensor(loss), "text": torch.tensor(0.5)})


def add(meter: Meter, right: int, loss: float) -> None:
    meter.add(output_of(right, loss), torch.zeros(1, 4, dtype=torch.int64))


def test_losses_are_means_over_the_episodes_and_accuracy_is_in_percent():
    meter = Meter(CPU)
    add(meter, right=1, loss=1.0)
    add(meter, right=4, loss=2.0)
    values = meter.take()
    assert values["accuracy"] == pytest.approx(100 * 5 / 8)
    assert values["loss_cross_entropy"] == pytest.approx(1.5)
    assert values["loss_text"] == pytest.approx(0.5)
    assert values["loss"] == pytest.approx(2.0)


def test_each_line_starts_from_zero():
    meter = Meter(CPU)
    add(meter, right=0, loss=9.0)
    meter.take()
    add(meter, right=4, loss=1.0)
    values = meter.take()
    assert (values["accuracy"], values["loss_cross_entropy"]) == (100, 1)


def test_a_resumed_meter_continues_the_sums():
    first, resumed = Meter(CPU), Meter(CPU)
    add(first, right=0, loss=1.0)
    resumed.restore(first.state())
    for meter in (first, resumed):
        add(meter, right=2, loss=3.0)
    expected, found = first.take(), resumed.take()
    for name in ("accuracy", "loss", "loss_cross_entropy", "loss_text"):
        assert found[name] == pytest.approx(expected[name])
    assert found["accuracy"] == 25


def test_each_line_counts_its_own_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])
    meter, rates = Meter(CPU), []
    for paused in (5.0, 0.0):
        add(meter, right=4, loss=1.0)
        now[0] += 2
        with meter.pause():
            now[0] += paused
        rates.append(meter.take()["episodes_per_second"])
    assert rates == [0.5, 0.5]


def test_waiting_is_a_percentage_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])

    def slowly() -> Iterator[int]:
        now[0] += 1
        yield 0

    meter = Meter(CPU)
    for _ in meter.timed(slowly()):
        now[0] += 3
        add(meter, right=4, loss=1.0)
    assert meter.take()["data_wait_percent"] == pytest.approx(25)


def test_a_resumed_meter_counts_the_time_of_several_processes_once(monkeypatch):
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: 0.0)
    meter = Meter(CPU)
    meter.restore([{"episodes": 3, "wait": wait, "elapsed": 8.0, "loss": 6.0} for wait in (1.0, 3.0)])
    values = meter.take()
    assert values["episodes_per_second"] == pytest.approx(6 / 8)
    assert values["data_wait_percent"] == pytest.approx(100 * 2 / 8)
    assert values["loss"] == pytest.approx(2.0)
