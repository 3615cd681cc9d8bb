"""A run that is killed at any moment resumes from a whole checkpoint, and ends like an uninterrupted one."""

import json
import os
import subprocess
import sys

from tests.helpers.same_runs import assert_same_run
from tests.helpers.shipped import ROOT
from tests.helpers.tiny_runs import tiny_config
from utils.config import save_config

KILLS = 25
FREQUENT_SAVES = (
    "TRAIN.TRAIN_EPISODES=11", "CHECKPOINT.SAVE_FREQ=1", "TRAIN.VAL_FREQ=6", "TRAIN.VAL_EPISODES=2",
    "TRAIN.PRINT_FREQ=4", "TRAIN.WAY=2", "DATA.SEQ_LEN=2", "DATA.CHECK_VIDEOS=false",
)  # fmt: skip


def test_a_run_killed_25_times_is_bit_exact(tiny_dataset, tmp_path):
    config = tmp_path / "config.yaml"
    images = f"DATA.DATA_DIR={tiny_dataset.frames}"  # which need no process that decodes, to be started at each kill
    save_config(tiny_config(tiny_dataset, tmp_path / "unused", *FREQUENT_SAVES, images), config)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/helpers/kill_jobs.py", config, tmp_path, str(KILLS)]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    killed = json.loads((tmp_path / "killed.json").read_text(encoding="utf-8"))
    assert sum(killed) == KILLS
    for number, kills in enumerate(killed):
        assert_same_run(tmp_path / f"cut_{number}", tmp_path / "whole")
        print(f"run {number} was killed {kills} times")
