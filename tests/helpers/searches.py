"""Searches of stand-in runs."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from run.command import exit_code_of
from run.sweep import main
from run.sweeping.local import LocalMachine
from run.sweeping.plan import SweepRun

JOBS = Path(__file__).with_name("search_jobs.py")
RATE = {"KEY": "SOLVER.LR", "LOW": 1e-5, "HIGH": 1e-2, "LOG": True}
CONTENT: dict[str, Any] = {
    "TITLE": "OTAM",
    "METHOD": "otam",
    "DATASET": "demo",
    "SET": "TRAIN.TRAIN_EPISODES=8 TRAIN.VAL_FREQ=2 TEST.TEST_EPISODES=7 INFO=note",
    "ROWS": [{"NAME": "OTAM"}],
    "SEARCH": [RATE, {"KEY": "MODEL.MATCHER", "VALUES": ["otam", "mean"]}],
    "SEEDS": [5, 6],
}


def write(folder: Path, **changes: Any) -> Path:
    """Writes a sweep file: CONTENT with some keys replaced, or left out if None."""
    folder.mkdir(exist_ok=True)
    content = {key: value for key, value in {**CONTENT, **changes}.items() if value is not None}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder / "sweep.yaml"


def trials_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the trials in order, without their durations."""
    trials = json.loads((folder / "search" / "trials.json").read_text())["trials"]
    return [{key: value for key, value in trial.items() if key != "seconds"} for trial in trials.values()]


@pytest.fixture
def search(tmp_path, monkeypatch) -> Callable[..., int]:
    """Returns a function that runs a search with the stand-in and returns the exit code of the command."""
    monkeypatch.setattr("run.sweeping.checks.check_data", lambda runs: None)
    monkeypatch.setattr(LocalMachine, "poll_seconds", 0.02)
    seconds = 0.0

    def command(run: SweepRun) -> list[str]:
        episodes, rate = run.config.TRAIN.TRAIN_EPISODES, run.config.SOLVER.LR
        assert not run.config.tests
        return [sys.executable, str(JOBS), str(run.directory), str(episodes), str(rate), str(seconds)]

    monkeypatch.setattr(SweepRun, "command", command)

    def run(number: int, *options: str, out: str = "out", wait: float = 0, **changes: Any) -> int:
        nonlocal seconds
        seconds = wait
        arguments = [str(write(tmp_path, **changes)), "--search", str(number), "--out", str(tmp_path / out), *options]
        return exit_code_of(lambda: main(arguments))

    return run
