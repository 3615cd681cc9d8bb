"""run/environment.sh: which interpreter it takes, what it refuses before it writes, which PyTorch it installs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Stands for every program that the script calls, under the name of each; notes what pip would install.
STUB = """#!/bin/sh
case "$(basename "$0") $*" in
    "nvidia-smi -L") exit "$NO_GPU" ;;
    "python -c "*) exit "$OLD" ;;
    "python run/requirements.py"*) [ -e installed ] ;;
    "python -m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    *--index-url*) echo "$*" >>notes; exit "$INDEX_FAILS" ;;
    "python -m pip install"*) echo "$*" >>notes; touch installed ;;
esac
"""
CPU = "--index-url https://download.pytorch.org/whl/cpu"


def sourced(folder: Path, programs: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Sources the script in a folder in which `python`, `nvidia-smi` and `programs` are stubs."""
    (folder / "run").mkdir(exist_ok=True)
    shutil.copy(ROOT / "run" / "environment.sh", folder / "run")
    for name in ("python", "nvidia-smi", *programs):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB, encoding="utf-8")
        path.chmod(0o755)
    settings = {"OLD": "0", "NO_GPU": "1", "INDEX_FAILS": "0", "PYTHON": "python", **environment}
    path_of_programs = f"{folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    script = 'set -eu; REQUIREMENTS="requirements.txt more.txt"; . run/environment.sh; echo "PYTHON is $PYTHON"'
    return subprocess.run(
        ["sh", "-c", script],
        cwd=folder, env={"PATH": path_of_programs, **settings}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def pip_calls(folder: Path) -> list[str]:
    return (folder / "notes").read_text(encoding="utf-8").splitlines()


def test_an_environment_that_has_everything_is_taken(tmp_path):
    (tmp_path / "installed").touch()
    assert sourced(tmp_path).stdout == "PYTHON is python\n"
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("broken", [{"OLD": "1"}, {"PYTHON": "no-such-python"}])
def test_an_unsuitable_python_is_refused_before_anything_is_made(tmp_path, broken):
    finished = sourced(tmp_path, **broken)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert "3.10" in line
    assert "PYTHON=" in line
    assert not (tmp_path / ".venv").exists()


def test_an_environment_of_an_old_python_or_another_machine_is_reported(tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to("/of/another/machine/python")
    finished = sourced(tmp_path)
    assert finished.returncode == 2
    assert "rm -r .venv" in finished.stderr
    assert not (tmp_path / "notes").exists()


def test_without_a_gpu_the_cpu_build_is_installed_first(tmp_path):
    finished = sourced(tmp_path, PIP_INSTALL_OPTIONS="-c versions.txt")
    assert finished.stdout == "PYTHON is .venv/bin/python\n", finished.stderr
    torch, rest = pip_calls(tmp_path)
    assert CPU in torch
    assert "--isolated" in torch  # so that both packages come from this index, and none from pip's settings
    assert torch.endswith("torch torchvision -c versions.txt")
    assert rest.endswith("-r requirements.txt -r more.txt -c versions.txt")


def test_an_index_that_cannot_be_reached_is_reported_and_not_used(tmp_path):
    finished = sourced(tmp_path, INDEX_FAILS="1")
    assert finished.returncode == 0
    assert "https://download.pytorch.org/whl/cpu cannot be used" in finished.stderr
    assert "index-url" not in pip_calls(tmp_path)[-1]


@pytest.mark.parametrize(
    ("programs", "environment"),
    [((), {"NO_GPU": "0"}), (("sbatch",), {}), (("qsub",), {}), ((), {"TORCH_INDEX": ""})],
    ids=["gpu", "slurm_login_node", "pbs_login_node", "by_hand"],
)
def test_where_a_gpu_may_be_used_pip_chooses_the_build(tmp_path, programs, environment):
    finished = sourced(tmp_path, programs, **environment)
    assert finished.returncode == 0, finished.stderr
    (call,) = pip_calls(tmp_path)
    assert "index-url" not in call
