"""Sweeps of stand-in runs."""

import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from run.command import exit_code_of
from run.sweep import main
from run.sweeping.plan import SweepRun, plan
from run.sweeping.sweep_file import load_sweep_file
from tests.helpers.toy_runs import toy_run

JOBS = Path(__file__).with_name("sweep_jobs.py")
CONTENT: dict[str, Any] = {
    "TITLE": "Matchers",
    "METHOD": "otam",
    "DATASET": "demo",
    "SET": "TRAIN.TRAIN_EPISODES=20 TRAIN.SHOT=1",
    "ROWS": [{"NAME": "OTAM"}, {"NAME": "mean", "SET": "MODEL.MATCHER=mean"}],
    "COLUMNS": [{"NAME": "1-shot"}, {"NAME": "5-shot", "SET": "TRAIN.SHOT=5"}],
    "SEEDS": [1, 2],
    "BASELINE": "OTAM",
}


def write(folder: Path, **changes: Any) -> Path:
    """Writes a sweep file: CONTENT with some keys replaced, or left out if None."""
    path = folder / "sweep.yaml"
    content = {key: value for key, value in {**CONTENT, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Callable[..., int]:
    """Returns a function that runs a sweep with the stand-in and returns the exit code of the command."""
    toy_run(tmp_path / "finished", [[1, 1], [1, 0], [0, 0], [1, 0]])
    monkeypatch.setattr("run.sweeping.checks.check_data", lambda runs: None)
    seconds = "0"

    def command(run: SweepRun) -> list[str]:
        return [sys.executable, str(JOBS), str(run.directory), str(tmp_path / "finished"), seconds]

    monkeypatch.setattr(SweepRun, "command", command)

    def sweep(*options: str, wait: float = 0, **changes: Any) -> int:
        nonlocal seconds
        seconds = str(wait)
        path = write(tmp_path, **changes)
        return exit_code_of(lambda: main([str(path), "--out", str(tmp_path / "out"), *options]))

    return sweep


def noted(tmp_path: Path, name: str) -> list[list[str]]:
    """Returns the lines of the stand-in's begun.txt or ended.txt."""
    path = tmp_path / "finished" / name
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def in_child(action: Callable[[], int], log: Path) -> int:
    """Starts `action` in a forked process, which prints into a file; returns its process id."""
    if child := os.fork():
        return child
    code = 1
    try:
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = action()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def csv_rows(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "table.csv", newline="", encoding="utf-8") as file:
        return {row["row"]: row for row in csv.DictReader(file)}


def runs_of(folder: Path, *overrides: str, rows: tuple[str, ...] = (), **changes: Any) -> list[SweepRun]:
    """Returns the runs of the sweep file that `write` writes with these changes."""
    return plan(load_sweep_file(write(folder, **changes)), folder / "out", overrides, rows)
