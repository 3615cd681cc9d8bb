"""Comparisons of two runs, bit by bit."""

from pathlib import Path
from typing import Any

import torch

from tests.helpers.tiny_runs import lines_of
from utils.checkpoint import load_checkpoint

TIMES = ("train/episodes_per_second", "train/data_wait_percent")


def assert_same_run(found: Path, expected: Path) -> None:
    """Compares weights, optimizer, sums, best accuracy, kept checkpoints and log lines without their times."""
    assert {p.name for p in found.glob("*.pt")} == {p.name for p in expected.glob("*.pt")}
    for path in expected.glob("*.pt"):
        mine, theirs = load_checkpoint(found / path.name), load_checkpoint(path)
        assert_same_model(mine, theirs)
        for key in ("episode", "best_accuracy", "validation_due", "kept"):
            assert mine[key] == theirs[key]
        assert [without_times(part) for part in mine["meter"]] == [without_times(part) for part in theirs["meter"]]
    assert [without_times(line) for line in lines_of(found)] == [without_times(line) for line in lines_of(expected)]


def assert_same_model(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(value, mine["model"][name]) for name, value in theirs["model"].items())
    assert mine["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    for number, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(value, mine["optimizer"]["state"][number][key]) for key, value in state.items())


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in (*TIMES, "wait", "elapsed")}
