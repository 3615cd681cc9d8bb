"""`run.py --profile N` writes a trace, prints the most expensive operations, and does not change runs."""

import json

import pytest

from run.run import main
from tests.helpers.commands import main_command, sentences_of, tiny_overrides
from tests.helpers.tiny_runs import tiny_config, trained
from utils.config import save_config


def events_of(path) -> list[dict]:
    return json.loads(path.read_text())["traceEvents"]


def test_a_trace_of_n_steps_is_written_without_training(tiny_dataset, tmp_path):
    finished = main_command(
        "configs/clipspm/demo.yaml", "--profile", "2", *tiny_overrides(tiny_dataset, tmp_path / "a")
    )
    assert finished.returncode == 0, finished.stderr
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"profile.pt.trace.json", "run.lock"}
    steps = [e for e in events_of(tmp_path / "a" / "profile.pt.trace.json") if "Optimizer.step" in e.get("name", "")]
    assert len(steps) == 2  # the warm-up is not in it
    assert "Self CPU %" in finished.stdout
    assert "ERROR" not in finished.stderr


def test_a_second_trace_gets_another_name_before_a_training_run(tiny_dataset, tmp_path):
    file = tmp_path / "tiny.yaml"
    small = ("TRAIN.TASKS_PER_BATCH=1", "TRAIN.TRAIN_EPISODES=2", "TRAIN.VAL_FREQ=0", "TRAIN.WAY=2", "DATA.SEQ_LEN=2")
    save_config(tiny_config(tiny_dataset, tmp_path / "run", *small), file)
    for _ in range(2):
        main(["--cfg", str(file), "--profile", "1"])
    main(["--cfg", str(file)])
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"profile.pt.trace.json", "profile_2.pt.trace.json", "checkpoint_best.pt", "results.json"}


def test_a_directory_with_a_run_is_refused_and_unchanged(tiny_dataset, tmp_path):
    trained(tiny_dataset, tmp_path / "run", "TRAIN.TRAIN_EPISODES=2")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    config = "configs/clipspm/demo.yaml"
    output = sentences_of(main_command(config, "--profile", "1", *tiny_overrides(tiny_dataset, tmp_path / "run")))
    assert "CHECKPOINT.CHECKPOINT_DIR" in output[-1]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


@pytest.mark.parametrize("steps", ["0", "-1", "two"])
def test_an_invalid_number_of_steps_is_reported_in_one_sentence(steps):
    finished = main_command("configs/clipspm/demo.yaml", f"--profile={steps}")
    assert finished.returncode == 2
    assert "--profile: expected a whole number" in finished.stderr


def test_a_test_only_config_cannot_be_profiled(tiny_dataset, tmp_path):
    (checkpoint := tmp_path / "x.pt").touch()
    only_test = ("TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={checkpoint}")
    overrides = [*tiny_overrides(tiny_dataset, tmp_path / "a"), *only_test]
    output = sentences_of(main_command("configs/clipspm/demo.yaml", "--profile", "1", *overrides))
    assert "TEST.ONLY_TEST" in output[-1]
    assert not (tmp_path / "a").exists()
