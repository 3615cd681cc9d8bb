"""Runs of several processes, started by torchrun or as it does."""

import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
from torch.distributed.launcher import LaunchConfig, elastic_launch

from tests.helpers.shipped import ROOT
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import DEMO, tiny_config
from utils.checkpoint import load_checkpoint
from utils.config import save_config

# Two processes add four episodes in a different order; SGD keeps such rounding differences small,
# Adam would amplify them where a gradient is zero up to rounding. The sum of two episodes is bit-exact.
SGD = (
    "SOLVER.OPTIM_METHOD=sgd", "SOLVER.LR=0.02", "SOLVER.LR_SCH=none", "SOLVER.WARMUP_EPISODES=0",
    "MODEL.SPM.GENERATOR_DROPOUT=0",
)  # fmt: skip
# A plug-in of the image tower, with groups of parameters.
PLUGIN = ROOT / "configs" / "tsfsar" / "demo.yaml"
FILES = {"plugin_and_groups": PLUGIN}


def torchrun(*arguments: str | Path) -> CompletedProcess[str]:
    """Runs two processes on the CPU; `--standalone` uses a free port, so that runs do not interfere."""
    return _run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments)


def launched(script: str, *arguments: str | Path) -> CompletedProcess[str]:
    """Runs a script that calls `launch`."""
    return _run(script, *arguments)


def _run(*words: str | Path) -> CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def launch(job: Callable[..., None], *arguments: object, restarts: int = 0) -> None:
    """Calls a function in two processes, started and restarted as by torchrun, but forks of this one.

    A fork has loaded PyTorch already, which takes a new process seconds.
    """
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.1, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, job)(*arguments)


def job(data: TinyDataset, directory: Path, *overrides: str, stop_after: int = 0) -> dict[str, Any]:
    """Runs a job of distributed_jobs.py with a tiny config, which is written beside the run directory."""
    file = directory.with_name(f"{directory.name}.yaml")
    save_config(tiny_config(data, directory, *overrides, file=FILES.get(directory.name, DEMO)), file)
    return {"config": str(file), "directory": str(directory), "stop_after": stop_after}


def saved(directory: Path) -> dict[str, Any]:
    return load_checkpoint(directory / "checkpoint_last.pt")


def results_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Returns the largest difference of the weights without batch norm statistics, which differ between processes."""
    names = [name for name in expected if "running_" not in name and "num_batches" not in name]
    assert found.keys() == expected.keys()
    return max((found[name].double() - expected[name].double()).abs().max().item() for name in names)
