"""run/environment.sh: the interpreter it uses, what it refuses before writing, and the PyTorch build it installs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.shipped import ROOT

# Replaces every program that the script calls, by name; logs what pip would install.
STUB = """#!/bin/sh
case "$(basename "$0") $*" in
    "nvidia-smi -L") exit "$NO_GPU" ;;
    "python -c import ensurepip"*) exit "$NO_VENV" ;;
    "python -c "*) "$REAL_PYTHON" -c "import sys; $DISGUISE; $2" ;;
    "python run/requirements.py"*) [ -e installed ] ;;
    "python -m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "python -m pip --version") [ -e .venv/pip ] || exit "$NO_PIP" ;;
    "python -m ensurepip") [ "$NO_VENV" = 0 ] && touch .venv/pip ;;
    *--index-url*) echo "$*" >>notes; exit "$INDEX_FAILS" ;;
    "python -m pip install"*) echo "$*" >>notes; touch installed ;;
    *) echo "$*" ;;
esac
"""
CPU = "--index-url https://download.pytorch.org/whl/cpu"


def sourced(
    folder: Path, programs: tuple[str, ...] = (), script: str = "", shell: str = "sh", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Sources the script in a folder in which `python`, `nvidia-smi` and `programs` are stubs; or runs `script`."""
    (folder / "run").mkdir(exist_ok=True)
    shutil.copy(ROOT / "run" / "environment.sh", folder / "run")
    for name in ("python", "nvidia-smi", *programs):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB, encoding="utf-8")
        path.chmod(0o755)
    no = {"NO_GPU": "1", "NO_VENV": "0", "NO_PIP": "0", "INDEX_FAILS": "0", "DISGUISE": "pass"}
    settings = {**no, "REAL_PYTHON": sys.executable, "PYTHON": "python", **environment}
    path_of_programs = f"{folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    source = 'set -eu; REQUIREMENTS="requirements.txt more.txt"; . run/environment.sh; echo "PYTHON is $PYTHON"'
    return subprocess.run(
        [shell, "-c", script or source],
        cwd=folder, env={"PATH": path_of_programs, **settings}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def pip_calls(folder: Path) -> list[str]:
    return (folder / "notes").read_text(encoding="utf-8").splitlines()


def test_a_complete_environment_is_used(tmp_path):
    (tmp_path / "installed").touch()
    assert sourced(tmp_path).stdout == "PYTHON is python\n"
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        ({"DISGUISE": "sys.version_info = (3, 9, 2)"}, "3.10"),
        ({"DISGUISE": "sys.implementation.name = 'pypy'"}, "CPython"),
        ({"NO_VENV": "1"}, "apt install python3-venv"),
        ({"PYTHON": "no-such-python"}, "missing"),
    ],
    ids=["old", "pypy", "no_venv_module", "missing"],
)
def test_an_unsuitable_python_is_refused_before_anything_is_written(tmp_path, broken, cause):
    finished = sourced(tmp_path, **broken)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert cause in line
    assert "PYTHON=" in line
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("target", ["", "/of/another/machine/python", "../../bin/python"])
def test_an_unusable_environment_is_reported(tmp_path, target):
    """An installation that was interrupted early, one of another machine, one without pip."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    if target:
        (tmp_path / ".venv" / "bin" / "python").symlink_to(target)
    finished = sourced(tmp_path, NO_PIP="1", NO_VENV="1")
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert "rm -r .venv" in line
    assert not (tmp_path / "notes").exists()


def test_pip_is_installed_into_an_environment_without_it(tmp_path):
    """An interrupted installation and `uv venv` give such environments."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to("../../bin/python")
    assert sourced(tmp_path, NO_PIP="1").stdout == "PYTHON is .venv/bin/python\n"
    assert (tmp_path / ".venv" / "pip").exists()


@pytest.mark.parametrize("shell", [name for name in ("sh", "dash", "bash") if shutil.which(name)])
def test_the_launcher_runs_from_any_folder_and_shell(tmp_path, shell):
    repository = tmp_path / "my repository"
    repository.mkdir()
    (repository / "installed").touch()
    shutil.copy(ROOT / "train_test.sh", repository)
    elsewhere = tmp_path / "elsewhere" / repository.name  # what CDPATH would find first
    elsewhere.mkdir(parents=True)
    script = f'cd ..; {shell} "my repository/train_test.sh" "my own.yaml" TRAIN.SHOT=5'
    finished = sourced(repository, script=script, shell=shell, CDPATH=str(elsewhere.parent))
    assert finished.stdout == f"run/run.py --cfg {tmp_path / 'my own.yaml'} TRAIN.SHOT=5\n", finished.stderr


def test_without_a_gpu_the_cpu_build_is_installed_first(tmp_path):
    finished = sourced(tmp_path, PIP_INSTALL_OPTIONS="-c versions.txt")
    assert finished.stdout == "PYTHON is .venv/bin/python\n", finished.stderr
    torch, rest = pip_calls(tmp_path)
    assert CPU in torch
    assert "--isolated" in torch  # so that both packages come from this index, and none from pip's settings
    assert torch.endswith("torch torchvision -c versions.txt")
    assert rest.endswith("-r requirements.txt -r more.txt -c versions.txt")


def test_an_unreachable_index_is_reported_and_not_used(tmp_path):
    finished = sourced(tmp_path, INDEX_FAILS="1")
    assert finished.returncode == 0
    assert "https://download.pytorch.org/whl/cpu cannot be used" in finished.stderr
    assert "index-url" not in pip_calls(tmp_path)[-1]


@pytest.mark.parametrize(
    ("programs", "environment"),
    [((), {"NO_GPU": "0"}), (("sbatch",), {}), (("qsub",), {}), ((), {"TORCH_INDEX": ""})],
    ids=["gpu", "slurm_login_node", "pbs_login_node", "by_hand"],
)
def test_with_a_gpu_pip_chooses_the_build(tmp_path, programs, environment):
    finished = sourced(tmp_path, programs, **environment)
    assert finished.returncode == 0, finished.stderr
    (call,) = pip_calls(tmp_path)
    assert "index-url" not in call
