"""A run that torchrun restarts ends like the uninterrupted one."""

from pathlib import Path

import pytest

from run.main_run import Learner
from run.run_directory import LOCK, open_run_directory
from tests.helpers.processes import SGD, job, largest_difference, launched, results_of, saved
from tests.helpers.same_runs import without_times
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import lines_of, tiny_config, trained
from utils.errors import UserError
from utils.files import last_holder, launcher

STEPS = (
    *SGD, "MODEL.FREEZE_BN=true", "TRAIN.TRAIN_EPISODES=10", "TRAIN.TASKS_PER_BATCH=4", "TRAIN.VAL_FREQ=5",
    "TRAIN.PRINT_FREQ=3", "TEST.TEST_EPISODES=7",
)  # fmt: skip


@pytest.fixture(scope="module")
def one(tiny_dataset: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the run by one process, uninterrupted."""
    directory = tmp_path_factory.mktemp("one") / "run"
    trained(tiny_dataset, directory, *STEPS).test()
    return directory


def assert_equal_up_to_rounding(found: Path, expected: Path) -> None:
    """Compares weights to 1e-6, the lines of metrics, and the outcome of every test episode, scored once."""
    assert saved(found)["episode"] == saved(expected)["episode"] == 10
    assert largest_difference(saved(found)["model"], saved(expected)["model"]) < 1e-6
    for mine, theirs in zip(lines_of(found), lines_of(expected), strict=True):
        assert without_times(mine) == pytest.approx(without_times(theirs), rel=1e-4, abs=1e-5)
    assert len(results_of(found)["per_episode"]) == 7
    assert results_of(found)["per_episode"] == results_of(expected)["per_episode"]


def test_a_restarted_run_equals_the_undisturbed_one(one, tiny_dataset, tmp_path):
    config = job(tiny_dataset, tmp_path / "run", *STEPS, "CHECKPOINT.SAVE_FREQ=4")["config"]
    finished = launched("tests/helpers/elastic_jobs.py", "--cfg", config)
    assert finished.returncode == 0, finished.stderr
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert "resumed after 4 episodes" in log
    assert log.count("resumed after") == 2
    assert "stopped by" in finished.stderr
    assert_equal_up_to_rounding(tmp_path / "run", one)


# Which starts are restarts


def test_only_a_restart_by_the_same_torchrun_resumes_automatically(tiny_dataset, tmp_path, monkeypatch):
    config = tiny_config(tiny_dataset, tmp_path / "run", *STEPS)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    assert Learner(config).directory.open() is None
    (tmp_path / "run" / "checkpoint_last.pt").write_bytes(b"")
    assert last_holder(tmp_path / "run" / LOCK)["started_by"] == launcher()
    with pytest.raises(UserError, match="never overwritten"):
        Learner(config).directory.open()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        Learner(config).directory.open()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    with pytest.raises(UserError, match="never overwritten"):
        Learner(config).directory.open()
    with pytest.raises(UserError, match="never overwritten"):
        open_run_directory(tmp_path / "run", resume=False)
