"""Sweeps: the file and its runs, running and resuming them; most with a stand-in for run/run.py."""

import csv
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import models
from run.command import run_command
from run.sweep import listing, main, title_of
from run.sweeping.execution import Execution
from run.sweeping.folder import FAILED, FINISHED, SweepFolder
from run.sweeping.local import LocalMachine
from run.sweeping.plan import SweepRun, plan
from run.sweeping.search import Search, TrialRun, Trials
from run.sweeping.search_table import best_of
from run.sweeping.study import PRUNED, Trial, _value
from run.sweeping.sweep_file import Tuned, load_sweep_file
from tests.helpers.commands import tiny_overrides
from tests.helpers.configs import refusal
from tests.helpers.shipped import ROOT, SWEEPS
from tests.helpers.sweeps import in_child, noted, runs_of, write
from tests.helpers.tiny_dataset import TinyDataset
from utils.errors import UserError


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


# The file and its runs


def test_runs_combine_rows_columns_and_seeds(tmp_path):
    runs = runs_of(tmp_path, "TEST.TEST_EPISODES=7")
    assert [(run.seed, run.row, run.column) for run in runs] == list(
        itertools.product([1, 2], ["OTAM", "mean"], ["1-shot", "5-shot"])
    )
    last = runs[-1].config
    assert (last.MODEL.SEED, last.TRAIN.SHOT, last.TRAIN.TRAIN_EPISODES, last.TEST.TEST_EPISODES) == (2, 5, 20, 7)
    assert last.MODEL.model_dump()["MATCHER"] == "mean"
    assert runs[-1].command()[2:4] == ["--cfg", "configs/otam/demo.yaml"]
    assert "--resume" in runs[-1].command()
    assert [run.row for run in runs_of(tmp_path, rows=("mean",))] == ["mean"] * 4


@pytest.mark.parametrize("word", ["meam", "TRAIN.SHOT=5"])
def test_a_word_that_is_in_no_row_name_is_refused(tmp_path, word):
    assert word in (refusal(lambda: runs_of(tmp_path, rows=("mean", word))) or "")


def test_titles_name_the_overrides_that_change_a_number():
    file = load_sweep_file(Path("configs/sweeps/demo_all_methods.yaml"))
    assert title_of(file, ["DATA.NUM_WORKERS=2", "DATA.DATA_DIR=data/x"]) == file.TITLE
    assert title_of(file, ["DATA.DATASET=x", "DATA.DATA_DIR=data/x"]) == f"{file.TITLE}, with DATA.DATASET=x"


def test_a_grid_gives_a_row_for_each_combination(tmp_path):
    grid = [{"KEY": f"MODEL.{name}.ENABLED", "VALUES": [False, True]} | {"NAME": name} for name in ("HSMR", "SPM")]
    grid.append({"KEY": "TRAIN.SHOT", "VALUES": [1, 5]})
    runs = runs_of(tmp_path, ROWS=[{"GRID": grid}], METHOD="clipspm", COLUMNS=None, BASELINE=None, SEEDS=[3])
    assert [run.row for run in runs[:3]] == ["SHOT 1", "SHOT 5", "SPM + SHOT 1"]
    assert len(runs) == 8
    model = runs[2].config.MODEL.model_dump()
    assert (model["HSMR"]["ENABLED"], model["SPM"]["ENABLED"]) == (False, True)


def test_the_config_file_follows_method_and_data_set(tmp_path):
    rows = [{"NAME": "TRX", "METHOD": "trx"}, {"NAME": "own", "CONFIG": "configs/clipspm/released/{DATASET}.yaml"}]
    columns = [{"NAME": "a", "DATASET": "hmdb51"}, {"NAME": "b", "DATASET": "ssv2_small"}]
    runs = runs_of(tmp_path, ROWS=rows, COLUMNS=columns, SEEDS=[1], METHOD=None, BASELINE=None)
    files = ["trx/hmdb51", "trx/ssv2_small", "clipspm/released/hmdb51", "clipspm/released/ssv2_small"]
    assert [str(run.config_file) for run in runs] == [f"configs/{name}.yaml" for name in files]


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"ROWS": [{"NAME": "a", "SET": "TRAIN.SHOTS=1"}, {"NAME": "b", "SET": "TRAIN.WAY=1"}]},
         ("a | 1-shot", "TRAIN.SHOTS", "b | 1-shot", "TRAIN.WAY")),
        ({"SET": "MODEL.SEED=3"}, ("MODEL.SEED", "SEEDS")),
        ({"METHOD": None}, ("METHOD",)),
        ({"BASELINE": "CLIP"}, ("BASELINE", "OTAM", "'CLIP'")),
        ({"ROWS": [{"NAME": "a"}, {"NAME": "a"}]}, ("ROWS", "'a'")),
        ({"ROWS": [{"SET": "TRAIN.WAY=5"}]}, ("NAME",)),
        ({"ROWS": None, "LINES": []}, ("ROWS", "LINES")),
        ({"SEEDS": [1, "two"]}, ("SEEDS.1", "'two'")),
        ({"SEEDS": 3}, ("SEEDS: expected", "list", "3")),
        ({"ROWS": None, "MODEL": {"NAME": "otam"}, "TRAIN": {"WAY": 5}}, ("run/run.py --cfg", "CONFIG")),
        ({"SET": "INFO='open"}, ("SET",)),
    ],
)  # fmt: skip
def test_all_errors_are_reported_before_anything_is_written(changes, facts, tmp_path):
    if "ROWS" in changes:
        changes = {"BASELINE": None, **changes}
    path = write(tmp_path, **changes)
    message = refusal(lambda: main([str(path), "--out", str(tmp_path / "out")]))
    assert message is not None
    assert all(fact in message for fact in facts), message
    assert not (tmp_path / "out").exists()


def test_run_names_differ_only_if_results_may_change(tmp_path):
    [name] = {run.name for run in runs_of(tmp_path, rows=("mean",)) if (run.column, run.seed) == ("1-shot", 1)}

    def renamed(*overrides: str) -> bool:
        return runs_of(tmp_path, *overrides, rows=("mean",))[0].name != name

    assert not renamed("DATA.NUM_WORKERS=3", "TEST.BATCH_EPISODES=9", "INFO=note", "TEST.FEATURE_CACHE=features")
    assert not renamed("TRAIN.WAY=5")  # the default, written out
    assert renamed("SOLVER.LR=1e-4")
    assert renamed("DATA.SPLIT_DIR=elsewhere")


def test_a_frozen_backbone_shares_its_features(tmp_path):
    frozen, trained = runs_of(tmp_path, ROWS=[{"NAME": "a", "SET": "MODEL.TRAINABLE=head"}, {"NAME": "b"}],
                              COLUMNS=None, SEEDS=[1], BASELINE=None)  # fmt: skip
    assert f"TEST.FEATURE_CACHE={tmp_path / 'out/features'}" in frozen.command()
    assert "FEATURE_CACHE" not in " ".join(trained.command())


def test_the_result_of_a_run_is_its_newest_file_with_content(tmp_path):
    run = runs_of(tmp_path)[0]
    run.directory.mkdir(parents=True)
    assert run.result() is None
    for seconds, name, content in ((3, "results.json", "{}"), (5, "results_2.json", "{}"), (7, "results_3.json", "")):
        (run.directory / name).write_text(content)
        os.utime(run.directory / name, (seconds, seconds))
    assert run.result() == run.directory / "results_2.json"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_shipped_sweep_file_resolves(path, tmp_path, capsys):
    main([str(path), "--dry-run", "--out", str(tmp_path / "out")])
    assert "0 finished" in capsys.readouterr().out


def test_benchmark_sweeps_test_all_seeds_on_the_same_episodes():
    for path in SWEEPS:
        file = load_sweep_file(path)
        if len(file.SEEDS) > 1 and not path.stem.startswith("demo_"):
            assert "TEST.SEED=6" in file.SET.split(), path.name


@pytest.mark.parametrize(
    ("name", "whole", "parts"),
    [
        ("clipspm_losses", "without both (as released)", ["without text loss", "without consistency loss"]),
        ("demo_clipspm_losses", "without both (as released)", ["without text loss", "without consistency loss"]),
        ("a2m2_parts", "fixed alignment, finest scale only", ["fixed alignment", "finest scale only"]),
        ("demo_a2m2_parts", "fixed alignment, finest scale only",
         ["fixed alignment", "finest scale only (4 x 4 regions)"]),
        ("demo_a2m2_parts", "fixed alignment, coarser scale only",
         ["fixed alignment", "coarser scale only (2 x 2 regions)"]),
        ("demo_actions", "CLIP-SPM, no module", [f"CLIP-SPM without {module}" for module in ("HSMR", "SPM", "PADM")]),
    ],
)  # fmt: skip
def test_a_row_without_several_parts_combines_the_rows_without_one(name, whole, parts):
    rows = {row.NAME: row.overrides for row in load_sweep_file(Path(f"configs/sweeps/{name}.yaml")).rows}
    assert sorted(rows[whole]) == sorted(word for part in parts for word in rows[part])
    assert all(rows[part] for part in parts)


@pytest.mark.parametrize("name", ["all_methods", "fair", "demo_all_methods"])
def test_sweeps_of_all_methods_include_every_method(name, tmp_path):
    runs = plan(load_sweep_file(Path(f"configs/sweeps/{name}.yaml")), tmp_path)
    assert {run.config.MODEL.NAME for run in runs} == set(models.available())


# Running


def test_a_failed_run_stops_no_other_and_is_repeated_with_retry(stand_in, tmp_path, capsys):
    changes = {
        "ROWS": [{"NAME": "fails", "SET": "MODEL.MATCHER=mean"}, {"NAME": "OTAM"}],
        "COLUMNS": None,
        "SEEDS": [1],
    }
    assert stand_in(**changes) == 2
    message = capsys.readouterr().err
    for fact in ("1 of 2 runs", "fails | accuracy | seed 1", "exit code 2", "the disk is on fire", "--retry"):
        assert fact in message
    assert [line[0].split("-")[0] for line in noted(tmp_path, "ended.txt")] == ["otam"]

    assert stand_in(**changes) == 2  # reported again, but nothing runs
    assert len(noted(tmp_path, "begun.txt")) == 2
    (tmp_path / "finished/repaired").touch()
    assert stand_in("--retry", **changes) == 0
    assert [line[0].split("-")[0] for line in noted(tmp_path, "begun.txt")] == ["fails", "otam", "fails"]
    assert "fails" in (tmp_path / "out/table.md").read_text()


def test_a_run_without_a_result_has_failed(stand_in, capsys):
    assert stand_in(ROWS=[{"NAME": "writes nothing"}], COLUMNS=None, SEEDS=[1], BASELINE=None) == 2
    assert "exit code 0" in capsys.readouterr().err


def test_the_next_sweep_resumes_a_stopped_run(stand_in, tmp_path):
    changes = {"ROWS": [{"NAME": "is stopped"}], "COLUMNS": None, "SEEDS": [1], "BASELINE": None}
    stand_in(**changes)
    (tmp_path / "finished/repaired").touch()
    assert stand_in(**changes) == 0
    assert len(noted(tmp_path, "ended.txt")) == 1


def test_dry_run_lists_runs_and_their_expected_time_and_writes_nothing(stand_in, tmp_path, capsys):
    assert stand_in("--dry-run") == 0
    assert not (tmp_path / "out").exists()
    assert stand_in("--rows", "OTAM") == 0
    capsys.readouterr()
    assert stand_in("--dry-run") == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["finished", "finished", "waiting", "waiting"] * 2
    assert re.search(r"8 runs, 4 finished, 4 to do: about \d+ s", total)


def test_the_time_of_what_is_to_do_is_divided_by_the_jobs(tmp_path):
    runs, folder = runs_of(tmp_path), SweepFolder(tmp_path / "out")  # 8 runs
    runs[0].directory.mkdir(parents=True)
    (runs[0].directory / "results.json").write_text("{}")
    folder.state[runs[0].name] = {"before": 0.0, "started": 1.0, "seconds": 600.0}
    trials = Trials.__new__(Trials)
    trials.number = 9
    trials.by_number = {1: Trial({}, FINISHED, seconds=400.0), 2: Trial({}, PRUNED, seconds=800.0)}
    for jobs, minutes in ((1, 70), (7, 10)):
        for lines in (listing(runs, folder, jobs), trials.listing(jobs)):
            assert f"7 to do: about {minutes} min with --jobs {jobs}" in lines[-1]


def test_gpus_that_the_machine_does_not_have_are_refused(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for count, gpus in ((0, "0"), (0, "GPU-5"), (2, "1,2")):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert stand_in("--gpus", gpus) == 2
        assert f"--gpus {gpus}" in (message := capsys.readouterr().err)
        assert f"{count} GPUs" in message
    assert not (tmp_path / "out").exists()
    assert stand_in("--gpus", "7", "--dry-run") == 0


def test_each_gpu_has_one_run_at_a_time(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert stand_in("--gpus", "3,GPU-5", wait=0.1) == 0
    ends = {line[0]: float(line[2]) for line in noted(tmp_path, "ended.txt")}
    for gpu in ("3", "GPU-5"):
        begun = [(float(line[2]), ends[line[0]]) for line in noted(tmp_path, "begun.txt") if line[1] == gpu]
        assert len(begun) > 1
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(begun))


def test_a_sweep_resumes_after_a_kill_at_any_time(stand_in, tmp_path):
    changes = {"COLUMNS": None, "SEEDS": [1, 2, 3]}
    times = random.Random(3)
    for _ in range(6):
        child = in_child(lambda: stand_in("--jobs", "2", wait=0.15, **changes), tmp_path / "log.txt")
        time.sleep(times.uniform(0.05, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    child = in_child(lambda: stand_in("--jobs", "2", wait=0.15, **changes), tmp_path / "log.txt")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, (tmp_path / "log.txt").read_text()
    ended = [line[0] for line in noted(tmp_path, "ended.txt")]
    assert len(ended) == len(set(ended)) == 6  # what was finished was not run again
    assert "Timeout" not in "".join(path.read_text() for path in (tmp_path / "out/logs").iterdir())  # of a lock
    with open(tmp_path / "out/table.csv", newline="") as file:
        assert [row["seeds"] for row in csv.DictReader(file)] == ["1 2 3"] * 2


def test_a_run_is_locked_from_the_start_of_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr(SweepRun, "command", lambda run: [sys.executable, "-c", "import time; time.sleep(60)"])
    folder, run = SweepFolder(tmp_path / "out"), runs_of(tmp_path)[0]
    assert not folder.is_in_use(run)
    [job] = LocalMachine(1).start([run], folder)
    assert folder.is_in_use(run)
    job.process.kill()
    job.process.wait()
    assert not folder.is_in_use(run)


def test_an_interrupted_sweep_saves_its_runs_and_a_second_one_is_refused(stand_in, tmp_path, capsys):
    def sweep() -> int:
        return run_command(lambda: stand_in(wait=30, COLUMNS=None), "the same command resumes them")

    child = in_child(sweep, tmp_path / "log.txt")
    while not noted(tmp_path, "begun.txt"):
        time.sleep(0.02)
    assert stand_in() == 2
    message = capsys.readouterr().err
    assert "in use" in message
    assert str(child) in message
    begin = time.monotonic()
    os.kill(child, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert (code, time.monotonic() - begin < 10) == (75, True), (tmp_path / "log.txt").read_text()
    assert stand_in(COLUMNS=None) == 0
    assert len(noted(tmp_path, "begun.txt")) == 5  # the stopped one twice


def test_a_sweep_of_a_real_run_reports_its_results(tiny_dataset: TinyDataset, tmp_path):
    small = [word for word in tiny_overrides(tiny_dataset, tmp_path) if not word.startswith("CHECKPOINT")]
    rows = [{"NAME": "OTAM"}]
    path = write(tmp_path, ROWS=rows, COLUMNS=None, SEEDS=[1])
    main([str(path), "--out", str(tmp_path / "out"), "--jobs", "2", *small])
    with open(tmp_path / "out/table.csv", newline="") as file:
        cells = {row["row"]: row for row in csv.DictReader(file)}
    (run,) = runs_of(tmp_path, *small, ROWS=rows, COLUMNS=None, SEEDS=[1])
    results = json.loads((run.directory / "results.json").read_text())
    assert float(cells["OTAM"]["mean"]) == pytest.approx(results["accuracy"], abs=1e-9)
    assert results["trained_with_seed"] == 1
    assert float(cells["OTAM"]["seconds"]) > 0


# Trials, times and the state


def test_the_best_trial_is_the_first_best_one_that_finished():
    trials = {1: Trial({}, PRUNED, [90.0]), 2: Trial({}, FINISHED, [70.0, 80.0]), 3: Trial({}, FINISHED, [85.0, 60.0])}
    trials |= {4: Trial({}, FAILED, [99.0]), 5: Trial({}, FINISHED, [85.0]), 6: Trial({}, "", [95.0])}
    assert best_of(trials) == 3
    assert best_of({1: trials[1]}) is None


def test_the_last_validation_of_a_trial_prunes_nothing():
    class Run(TrialRun):
        number, episodes, accuracies = 1, 4, {2: 50.0, 4: 40.0}
        validations = lambda self: self.accuracies  # noqa: E731

    search, asked = Search.__new__(Search), []
    search.trials = SimpleNamespace(by_number={1: Trial({})}, write=lambda: None)
    search.study = SimpleNamespace(is_pruned=lambda found, *_: asked.append(list(found)))
    assert not search._is_pruned_by_validations(Run.__new__(Run))
    assert asked == [[50.0]]
    assert search.trials.by_number[1].validations == [50.0, 40.0]


def test_values_are_rounded_to_four_digits_within_their_range():
    wide, narrow = (Tuned(KEY="SOLVER.LR", LOW=low, HIGH=high) for low, high in ((0.0, 1.0), (0.12344, 0.12346)))
    assert _value(wide, 0.123456) == 0.1235
    assert [_value(narrow, value) for value in (0.123441, 0.123459)] == [0.12344, 0.12346]
    assert _value(Tuned(KEY="SOLVER.WARMUP_EPISODES", LOW=0, HIGH=200_000), 123_456) == 123_456


@pytest.mark.parametrize(("jobs", "left"), [(1, "90 s"), (2, "45 s"), (10_000, "45 s")])
def test_the_time_left_is_shared_by_no_more_jobs_than_runs(jobs, left, tmp_path):
    runs = runs_of(tmp_path)[:2]
    folder = SimpleNamespace(estimates=lambda runs: {run.name: 45.0 for run in runs})
    execution = Execution(runs, folder, SimpleNamespace(jobs=jobs), lambda: None)
    execution.waiting.extend(runs)
    assert execution.progress_text() == f"0 running, {left} left"


def test_the_time_of_a_run_includes_its_earlier_attempts(tmp_path):
    run, folder = runs_of(tmp_path)[0], SweepFolder(tmp_path / "out")
    run.directory.mkdir(parents=True)
    (run.directory / "results.json").write_text("{}")
    os.utime(run.directory / "results.json", (1030, 1030))
    folder.state[run.name] = {"before": 100.0, "started": 1000.0}
    assert folder.seconds(run) == 130


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"a": 3}', '{"a": {"started": 1.0}}', '{"a": {"before": [1], "started": 1.0}}', "[" * 100_000],
)
def test_a_damaged_state_is_refused(content, tmp_path):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json"):
        SweepFolder(tmp_path)
    (tmp_path / "state.json").write_text('{"a": {"before": 0.0, "started": 1.5, "job": "7"}}')
    assert SweepFolder(tmp_path).state["a"]["job"] == "7"
