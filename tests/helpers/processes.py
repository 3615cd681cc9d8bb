"""Runs of several processes, started with torchrun."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

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


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs two processes on the CPU; `--standalone` uses a free port, so that runs do not interfere."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


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
