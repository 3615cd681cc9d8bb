"""Sweeps on SLURM: submitit with its local and debug executors, and a stand-in for sbatch, srun,
squeue, scontrol and scancel.

None of this has run on a cluster.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from run.sweeping import cluster
from run.sweeping.cluster import Cluster, ClusterJob, parsed_parameters
from run.sweeping.process import RunInJob
from tests.helpers.configs import refusal
from tests.helpers.searches import trials_of
from tests.helpers.shipped import ROOT
from tests.helpers.sweeps import csv_rows, in_child, noted

submitit = pytest.importorskip("submitit", reason="pip install -r requirements-sweep.txt")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Returns the folder of a stand-in for SLURM that is found before any other."""
    commands, queue = tmp_path / "bin", tmp_path / "queue"
    commands.mkdir()
    queue.mkdir()
    for name in ("sbatch", "srun", "squeue", "scontrol", "scancel"):
        (commands / name).symlink_to(ROOT / "tests" / "helpers" / "slurm_jobs.sh")
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(queue))
    monkeypatch.setattr(Cluster, "poll_seconds", 0.1)
    monkeypatch.setattr(cluster, "SECONDS_BETWEEN_QUERIES", 0.3)
    return queue


def wait_for(path: Path) -> str:
    while not (path.exists() and path.read_text()):
        time.sleep(0.02)
    return path.read_text()


def test_runs_are_a_job_array_and_a_timed_out_job_resumes(slurm, stand_in, tmp_path):
    options = ("--slurm", "partition=gpu,gres=gpu:1,time=1:00:00", "--jobs", "5")
    child = in_child(lambda: stand_in(*options, wait=1.5, COLUMNS=None, SEEDS=[1]), tmp_path / "log.txt")
    while not noted(tmp_path, "begun.txt"):
        time.sleep(0.02)
    stopped = noted(tmp_path, "begun.txt")[0][0]
    job = "101_0" if stopped.startswith("otam") else "101_1"
    os.kill(int(wait_for(slurm / f"process_{job}")), signal.SIGUSR2)  # as SLURM does before the end of the time
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, (tmp_path / "log.txt").read_text()

    script = (slurm / "101.batch").read_text()
    for line in ("--partition=gpu", "--gres=gpu:1", "--time=60", "--array=0-1%2", "--signal=USR2@180"):
        assert f"#SBATCH {line}" in script
    assert sorted(line[0] == stopped for line in noted(tmp_path, "begun.txt")) == [False, True, True]
    assert len(noted(tmp_path, "ended.txt")) == 2
    rows = csv_rows(tmp_path / "out")
    assert float(rows["OTAM"]["seconds"]) >= 1.5  # without the time in the queue


def test_a_restarted_sweep_finds_its_jobs_in_the_queue(slurm, stand_in, tmp_path):
    options = ("--slurm", "time=60")
    child = in_child(lambda: stand_in(*options, wait=2, COLUMNS=None, SEEDS=[1]), tmp_path / "log.txt")
    while len(list(slurm.glob("process_*"))) < 2:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert stand_in(*options, COLUMNS=None, SEEDS=[1]) == 0
    assert (slurm / "number").read_text().strip() == "101"  # nothing was submitted again
    assert len(noted(tmp_path, "begun.txt")) == 2


def test_a_lost_job_counts_as_failed(slurm, stand_in, tmp_path):
    child = in_child(lambda: stand_in("--slurm", "time=60", wait=5, COLUMNS=None, SEEDS=[1]), tmp_path / "log")
    processes = [int(wait_for(slurm / f"process_101_{task}")) for task in (0, 1)]
    while len(noted(tmp_path, "begun.txt")) < 2:
        time.sleep(0.02)
    for process in processes:
        os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    state = json.loads((tmp_path / "out/state.json").read_text())
    assert ["exit code 1" in run["failure"] for run in state.values()] == [True, True]


def test_a_job_is_not_lost_while_squeue_fails(slurm, tmp_path):
    squeue = tmp_path / "bin" / "squeue"
    squeue.unlink()
    squeue.write_text("#!/bin/sh\nexit 1\n")
    squeue.chmod(0o755)
    cluster.queue.cache_clear()
    assert cluster.queue(0) is None
    assert ClusterJob(SimpleNamespace(job_id="101_0"), None, None).is_queued()


def test_a_restarted_search_finds_its_jobs_in_the_queue(slurm, search, tmp_path):
    options = ("--slurm", "time=60", "--jobs", "2")
    child = in_child(lambda: search(2, *options, wait=0.5), tmp_path / "log.txt")
    for task in (0, 1):
        wait_for(slurm / f"process_101_{task}")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert search(2, *options) == 0
    assert (slurm / "number").read_text().strip() == "101"  # nothing was submitted again
    assert [trial["state"] for trial in trials_of(tmp_path / "out")] == ["finished"] * 2


def test_a_pruned_trial_is_stopped_on_a_cluster(slurm, search, tmp_path):
    options = ("--slurm", "time=60", "--jobs", "1")
    changes = {"SEARCH": [{"KEY": "SOLVER.LR", "VALUES": [1e-5, 1e-3]}]}
    assert search(1, *options, **changes) == 0
    file = tmp_path / "out" / "search" / "trials.json"
    content = json.loads(file.read_text())
    content["trials"] = {str(n): content["trials"]["1"] for n in range(1, 6)} | {"6": {"values": {"SOLVER.LR": 1e-5}}}
    file.write_text(json.dumps(content))
    begin = time.monotonic()
    assert search(6, *options, wait=5, **changes) == 0
    assert time.monotonic() - begin < 12  # all of its validations take 20 seconds
    assert trials_of(tmp_path / "out")[5]["state"] == "pruned"


@pytest.mark.parametrize("executor", ["debug", "local"])
def test_a_job_returns_its_exit_code_and_output(executor, tmp_path):
    work = RunInJob([sys.executable, "-c", "print('hello'); raise SystemExit(3)"], str(tmp_path / "log.txt"), "sweep")
    execution = submitit.AutoExecutor(tmp_path / "jobs", cluster=executor)
    execution.update_parameters(timeout_min=5)
    code, seconds = execution.submit(work).result()
    assert (code, seconds > 0) == (3, True)
    assert (tmp_path / "log.txt").read_text() == "hello\n"


def test_parameters_are_parsed_and_validated(slurm, tmp_path):
    assert parsed_parameters("time=1-02:30:00,cpus-per-task=8,gres=gpu:1") == {
        "time": 26 * 60 + 30, "cpus_per_task": 8, "gres": "gpu:1",
    }  # fmt: skip
    times = {"30:00": 30, "0:90": 2, "4:00:00": 240, "4:00:30": 241, "1-12": 2160, "2-0:30": 2910, "90": 90}
    assert {text: parsed_parameters(f"time={text}")["time"] for text in times} == times
    for text in ("1:2:3:4", "4h", "-5", "UNLIMITED"):
        with pytest.raises(ValueError, match=text):
            parsed_parameters(f"time={text}")
    message = refusal(lambda: cluster._executor(tmp_path, {"partitoin": "gpu"}))
    assert message is not None
    assert "partitoin" in message
