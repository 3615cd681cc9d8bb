"""Searches on the validation classes: the search space, trials, pruning, continuing, and what is written."""

import csv
import json
import os
import random
import shutil
import signal
import sys
import time

import pytest
import yaml

from run.command import exit_code_of
from run.run import main as run_main
from run.sweep import main
from run.sweeping.local import LocalMachine
from run.sweeping.plan import SweepRun, plan
from run.sweeping.sweep_file import load_sweep_file
from tests.helpers.commands import tiny_overrides
from tests.helpers.configs import refusal
from tests.helpers.searches import RATE, trials_of, write
from tests.helpers.shipped import ROOT
from tests.helpers.sweeps import in_child
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.toy_runs import toy_run
from utils.config import load_config

pytest.importorskip("optuna", reason="pip install -r requirements-sweep.txt")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


# The search space


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"SEARCH": None}, ("SEARCH",)),
        ({"SEARCH": [{"KEY": "SOLVER.LRR", "VALUES": [1]}]}, ("SOLVER.LRR", "SOLVER.LR")),
        ({"SEARCH": [{"KEY": "SOLVER", "VALUES": [{"LR": 1}]}]}, ("SOLVER", "section")),
        ({"SEARCH": [{"KEY": "TEST.SHOT", "VALUES": [1]}, {"KEY": "LOG.WANDB", "VALUES": [True]}]},
         ("TEST.SHOT", "LOG.WANDB")),
        ({"SEARCH": [{"KEY": "TRAIN.VAL_EPISODES", "VALUES": [5]}]}, ("TRAIN.VAL_EPISODES",)),
        ({"SEARCH": [{"KEY": "TRAIN.SHOT", "VALUES": [1, 5]}]}, ("TRAIN.SHOT", "TEST.SHOT")),
        ({"SEARCH": [{"KEY": "MODEL.SEED", "VALUES": [1]}]}, ("MODEL.SEED",)),
        ({"SEARCH": [{"KEY": "SOLVER.LR", "VALUES": ["fast", -1.0]}]}, ("SOLVER.LR", "'fast'", "-1.0")),
        ({"SEARCH": [{"KEY": "SOLVER.LR", "LOW": 1, "HIGH": 1}]}, ("SEARCH.0", "SOLVER.LR", "LOW")),
        ({"SEARCH": [{"KEY": "SOLVER.LR", "LOW": 0, "HIGH": 1, "LOG": True}]}, ("SOLVER.LR", "LOW")),
        ({"SEARCH": [{"KEY": "SOLVER.LR", "HIGH": 1}]}, ("SOLVER.LR", "LOW")),
        ({"SEARCH": [{"KEY": "SOLVER.LR", "HIGH": 1, "VALUES": [1]}]}, ("SOLVER.LR", "VALUES")),
        ({"SEARCH": [RATE, RATE.copy()]}, ("SEARCH", "SOLVER.LR")),
        ({"SEARCH": [{"KEY": "SOLVER.LR", "LOWER": 1}]}, ("SEARCH.0.LOWER",)),
        ({"SEARCH": [{"KEY": "MODEL.FREEZE_BN", "LOW": 0, "HIGH": 1}]}, ("MODEL.FREEZE_BN",)),
        ({"SEARCH": [{"KEY": "SOLVER.WARMUP_EPISODES", "LOW": 0.5, "HIGH": 1.5}]}, ("SOLVER.WARMUP_EPISODES", "0.5")),
        ({"ROWS": [{"NAME": "a"}, {"NAME": "b"}]}, ("2 rows", "--rows")),
        ({"SET": "TRAIN.VAL_FREQ=0"}, ("TRAIN.VAL_FREQ",)),
        ({"SET": "TRAIN.VAL_SPLIT=test"}, ("TRAIN.VAL_SPLIT",)),
    ],
)  # fmt: skip
def test_an_impossible_search_is_refused(tmp_path, changes, facts):
    path = write(tmp_path, **changes)
    message = refusal(lambda: main([str(path), "--search", "2", "--out", str(tmp_path / "out")])) or ""
    for fact in facts:
        assert fact in message
    assert not (tmp_path / "out").exists()


def test_dry_run_lists_the_search_space_and_writes_nothing(search, tmp_path, capsys):
    assert search(20, "--dry-run") == 0
    shown = capsys.readouterr().out
    for fact in ("OTAM", "SOLVER.LR", "1e-05", "0.01", "MODEL.MATCHER: otam, mean", "20 trials"):
        assert fact in shown
    assert not (tmp_path / "out").exists()


def test_missing_optuna_is_reported_in_one_sentence(search, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert search(2) == 2
    assert "requirements-sweep.txt" in capsys.readouterr().err


# Trials


def test_a_search_is_repeatable_prunes_and_resumes(search, tmp_path):
    assert search(8, out="whole") == 0
    assert search(4, out="parts") == 0
    assert search(8, out="parts") == 0
    whole = trials_of(tmp_path / "whole")
    assert trials_of(tmp_path / "parts") == whole
    assert whole[0]["values"] == {"SOLVER.LR": 1e-3, "MODEL.MATCHER": "otam"}  # of the config itself
    rates = [trial["values"]["SOLVER.LR"] for trial in whole]
    assert len(set(rates)) == 8
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    finished = [trial for trial in whole if trial["state"] == "finished"]
    pruned = [trial for trial in whole if trial["state"] == "pruned"]
    assert len(finished) + len(pruned) == 8
    assert pruned
    assert all(len(trial["validations"]) < 4 for trial in pruned)
    assert all(len(trial["validations"]) == 4 for trial in finished)


def test_a_pruned_trial_is_stopped(search, tmp_path):
    space = [{"KEY": "SOLVER.LR", "VALUES": [1e-5, 1e-3]}]
    assert search(1, SEARCH=space) == 0
    file = tmp_path / "out" / "search" / "trials.json"
    content = json.loads(file.read_text())
    first = content["trials"]["1"]
    content["trials"] = {str(n): first for n in range(1, 6)} | {"6": {"values": {"SOLVER.LR": 1e-5}}}
    file.write_text(json.dumps(content))
    begin = time.monotonic()
    assert search(6, wait=5, SEARCH=space) == 0
    assert time.monotonic() - begin < 10  # all of its validations take 20 seconds
    assert trials_of(tmp_path / "out")[5]["state"] == "pruned"


def test_a_search_resumes_after_a_kill_at_any_time(search, tmp_path):
    assert search(5, out="whole") == 0
    times = random.Random(2)
    for _ in range(3):
        child = in_child(lambda: search(5, wait=0.03), tmp_path / "log.txt")
        time.sleep(times.uniform(0.3, 1.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert search(5) == 0
    assert trials_of(tmp_path / "out") == trials_of(tmp_path / "whole")


def test_an_interrupted_trial_is_resumed_and_completed(search, tmp_path):
    changes = {"SEARCH": [{"KEY": "TRAIN.TRAIN_EPISODES", "VALUES": [16]}]}
    assert search(1, **changes) == 0
    folder = tmp_path / "out" / "search"
    content = json.loads((folder / "trials.json").read_text())
    whole = content["trials"]["1"]
    assert len(whole["validations"]) == 8
    content["trials"]["1"] = {**whole, "state": "", "validations": whole["validations"][:2]}
    (folder / "trials.json").write_text(json.dumps(content))
    metrics = folder / "trial_0001" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:4]))  # up to the 8 episodes of the config
    assert search(1, **changes) == 0
    assert trials_of(tmp_path / "out")[0]["validations"] == whole["validations"]


def test_a_failed_trial_stops_no_other_and_is_repeated_with_retry(search, tmp_path, capsys):
    changes = {"SEARCH": [{"KEY": "SOLVER.LR", "VALUES": [1e-3, 0.1]}]}
    assert search(6, **changes) == 0
    trials = trials_of(tmp_path / "out")
    assert {trial["values"]["SOLVER.LR"]: trial["state"] for trial in trials} == {1e-3: "finished", 0.1: "failed"}
    assert "the loss is nan" in capsys.readouterr().out
    logs = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out" / "search" / "logs").iterdir())]
    assert search(6, "--retry", **changes) == 0
    again = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out" / "search" / "logs").iterdir())]
    assert [a != b for a, b in zip(logs, again, strict=True)] == [trial["state"] == "failed" for trial in trials]


def test_trials_with_other_settings_are_refused(search, tmp_path, capsys):
    assert search(1) == 0
    assert search(2, "TRAIN.SHOT=3") == 2
    assert "TRAIN.SHOT" in capsys.readouterr().err
    assert search(2, SEARCH=[RATE]) == 2
    assert "search" in capsys.readouterr().err
    assert search(2, "DATA.NUM_WORKERS=3") == 0


# Results


def test_the_best_config_records_values_test_and_number_of_trials(search, tmp_path):
    assert search(4) == 0
    folder = tmp_path / "out" / "search"
    trials = trials_of(tmp_path / "out")
    finished = [trial for trial in trials if trial["state"] == "finished"]
    best = max(finished, key=lambda trial: max(trial["validations"]))
    config = load_config(folder / "best.yaml").config
    assert {"SOLVER.LR": config.SOLVER.LR, "MODEL.MATCHER": config.MODEL.model_dump()["MATCHER"]} == best["values"]
    assert (config.TEST.TEST_EPISODES, config.MODEL.SEED) == (7, 5)
    assert config.INFO.startswith("note; tuned: 4 trials on validation classes")
    with open(folder / "search.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [max(trial["validations"]) for trial in trials]
    assert [float(row["SOLVER.LR"]) for row in rows] == [trial["values"]["SOLVER.LR"] for trial in trials]
    assert f"**{max(best['validations']):.2f}**" in (folder / "search.md").read_text()

    sweep = write(tmp_path, CONFIG=str(folder / "best.yaml"), SET=None)  # a table of the best config names the trials
    [run] = plan(load_sweep_file(sweep), tmp_path / "table")[:1]
    toy_run(run.directory, [[1, 1], [1, 0], [0, 0], [1, 0]], info=run.config.INFO)
    main([str(sweep), "--out", str(tmp_path / "table"), "--only-table"])
    assert "tuned: 4 trials on validation classes." in (tmp_path / "table" / "table.md").read_text()


class EndedJob:
    """A run that ended in this process."""

    def __init__(self, run: SweepRun) -> None:
        self.code = exit_code_of(lambda: run_main(run.command()[2:]))

    def exit_code(self) -> int:
        return self.code


def test_a_search_never_reads_the_test_classes(own: TinyDataset, tmp_path, monkeypatch):
    monkeypatch.setattr(LocalMachine, "start", lambda self, runs, folder: [EndedJob(run) for run in runs])
    for folder in own.videos.glob("test_*"):
        shutil.rmtree(folder)
    classes = yaml.safe_load((own.splits / "classes.yaml").read_text())
    (own.splits / "classes.yaml").write_text(yaml.safe_dump({k: v for k, v in classes.items() if k != "test"}))
    small = [word for word in tiny_overrides(own, tmp_path) if not word.startswith("CHECKPOINT")]
    path = write(tmp_path / "sweep", SEARCH=[{"KEY": "SOLVER.LR", "VALUES": [1e-3]}])
    main([str(path), "--search", "1", "--out", str(tmp_path / "out"), *small])
    [trial] = trials_of(tmp_path / "out")
    assert trial["state"] == "finished"
    assert not list((tmp_path / "out").rglob("results*.json"))
