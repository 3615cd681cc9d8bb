"""The soak test measures a real run and distinguishes rising from flat measurements."""

import numpy as np
import pytest

from benchmarks.soak import Sample, rise, soak, table, verdicts


def samples(**rises: float) -> list[Sample]:
    """Returns forty samples of 100 that rise by a share of it from the first to the last."""
    names = ("main_megabytes", "workers_megabytes", "handles", "threads", "milliseconds_per_step")
    return [
        Sample(step, *(100 * (1 + rises.get(name, 0.0) * step / 39) for name in names))  # type: ignore[arg-type]
        for step in range(40)
    ]


def test_a_rise_is_reported_as_a_share_of_the_mean():
    assert rise(np.linspace(90, 110, 11)) == pytest.approx(0.2)
    assert rise(np.full(5, 7.0)) == pytest.approx(0)


@pytest.mark.parametrize("figure", ["main_megabytes", "workers_megabytes", "handles", "threads"])
def test_a_rise_of_a_tenth_is_not_flat(figure):
    found = verdicts(samples(**{figure: 0.1}))
    assert [name for name, (_, is_flat) in found.items() if not is_flat] == [figure]
    assert "NOT FLAT" in table(samples(**{figure: 0.1}))


def test_a_jump_during_warm_up_is_ignored():
    early = [Sample(0, 10, 10, 10, 10, 10)] * 5
    assert "NOT FLAT" not in table([*early, *samples()])


def test_a_real_run_is_measured_at_every_log_line(tiny_dataset):
    small = [
        f"DATA.DATA_DIR={tiny_dataset.videos}", f"DATA.SPLIT_DIR={tiny_dataset.splits}", "DATA.DATASET=tiny",
        "DATA.SEQ_LEN=2", "DATA.IMG_SIZE=32", "DATA.SHORT_SIDE=32", "TRAIN.WAY=2", "TRAIN.QUERY_PER_CLASS=1",
        "DEVICE.DEVICE=cpu", "TRAIN.VAL_FREQ=4",
    ]  # fmt: skip
    found = soak(8, 1, small)
    assert [sample.steps for sample in found] == list(range(1, 9))
    for sample in found:
        assert min(sample.main_megabytes, sample.handles, sample.threads, sample.milliseconds_per_step) > 0
    assert all(sample.workers_megabytes > 0 for sample in found[:3])
