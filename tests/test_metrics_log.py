"""metrics.jsonl and TensorBoard contain each number once, also after a run was interrupted."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from run.metrics_log import MetricsWriter


@pytest.mark.parametrize("validation_due", [False, True])
def test_a_resumed_run_replaces_what_it_repeats(tmp_path, validation_due):
    for first, episodes, value in ((0, (1, 2, 3), 0.0), (2, (3, 4), 1.0)):
        with MetricsWriter(tmp_path, first, validation_due and first > 0) as writer:
            for episode in episodes:
                writer.write(episode, "train", {"loss": value})
                writer.write(episode, "val", {"accuracy": value})
            if first and validation_due:
                writer.write(2, "val", {"accuracy": value})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = {1: 0.0, 2: 0.0, 3: 1.0, 4: 1.0}
    assert {line["episode"]: line["train/loss"] for line in lines if "train/loss" in line} == expected
    validations = sorted((line["episode"], line["val/accuracy"]) for line in lines if "val/accuracy" in line)
    assert validations == sorted((expected | {2: float(validation_due)}).items())
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert {event.step: event.value for event in events} == expected
