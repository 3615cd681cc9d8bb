"""The SLURM script starts the main command as one of several processes and requeues stopped runs."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.shipped import ROOT

# Replaces the programs of a cluster: each logs its arguments.
PROGRAMS = {
    "srun": 'echo "srun $1" >> "$NOTES"; shift; SLURM_PROCID=5 SLURM_LOCALID=1 "$@"',
    "scontrol": 'echo "scontrol $*" >> "$NOTES"; [ "$1" = requeue ] || printf "first\\nsecond\\n"',
    "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$NOTES"; exit "$CODE"',
}


def submitted(tmp_path: Path, code: int) -> tuple[int, list[str]]:
    """Returns the exit code of the script if its run ends with `code`, and the calls of the programs."""
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python", "NOTES": str(tmp_path / "notes"),
        "CODE": str(code), "SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "8",
    }  # fmt: skip
    command = ["sh", "run/slurm.sh", "configs/clipspm/demo.yaml", "INFO=two words"]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.stderr == ""
    return finished.returncode, (tmp_path / "notes").read_text().splitlines()


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (75, 0), (2, 2)])
def test_only_a_stopped_run_is_requeued(tmp_path, code, expected):
    found, notes = submitted(tmp_path, code)
    assert found == expected
    run = "5 1 8 first 20007 run/run.py --resume --cfg configs/clipspm/demo.yaml INFO=two words"
    assert notes[:3] == ["scontrol show hostnames node[1-2]", "srun --kill-on-bad-exit=1", run]
    assert notes[3:] == (["scontrol requeue 20007"] if code == 75 else [])


def test_processes_receive_the_signal_and_a_config_is_required():
    text = (ROOT / "run" / "slurm.sh").read_text(encoding="utf-8")
    assert "#SBATCH --signal=USR1@" in text
    finished = subprocess.run(["sh", "run/slurm.sh"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode != 0
    assert "usage: sbatch run/slurm.sh CONFIG" in finished.stderr
