"""LOG.WANDB: the same numbers as metrics.jsonl, with a stand-in for wandb and with the real one offline."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from run.main_run import Learner
from tests.helpers.configs import refusal
from tests.helpers.tiny_runs import lines_of, tiny_config, trained


class StandIn(SimpleNamespace):
    """Replaces wandb and records what is logged."""

    def __init__(self) -> None:
        super().__init__(__spec__=SimpleNamespace(), runs=[])

    def init(self, **options: Any) -> SimpleNamespace:
        run = SimpleNamespace(options=options, logged=[], is_finished=False)
        run.define_metric = lambda *names, **options: None
        run.log = run.logged.append
        run.finish = lambda: setattr(run, "is_finished", True)
        self.runs.append(run)
        return run


def test_a_tracked_run_logs_the_numbers_of_its_files(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := StandIn())
    results = trained(tiny_dataset, tmp_path / "run", "LOG.WANDB=true").test()
    training, test = wandb.runs
    assert training.logged == lines_of(tmp_path / "run")
    assert test.logged[0]["test/accuracy"] == results["accuracy"]
    assert training.options["id"] == test.options["id"]
    assert training.options["config"]["MODEL.NAME"] == results["method"]
    assert all(run.is_finished and run.options["resume"] == "allow" for run in wandb.runs)


def test_an_untracked_run_does_not_import_wandb(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import fails
    trained(tiny_dataset, tmp_path / "run").test()
    message = refusal(lambda: Learner(tiny_config(tiny_dataset, tmp_path / "other", "LOG.WANDB=true")))
    assert message is not None
    assert "LOG.WANDB" in message
    assert not (tmp_path / "other").exists()


def test_the_real_package_logs_offline(tiny_dataset, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install -r requirements-sweep.txt")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trained(tiny_dataset, tmp_path / "run", "LOG.WANDB=true").test()
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    stored = b"".join(file.read_bytes() for file in files)
    for name in ("train/loss", "val/accuracy", "test/accuracy"):
        assert name.encode() in stored
    [line, *_] = [line for line in lines_of(tmp_path / "run") if "val/accuracy" in line]
    assert json.dumps(line["val/accuracy"]).encode() in stored
