"""Describes the machine of a measurement; printed above every table."""

import os
import platform
from pathlib import Path

import torch

from utils.utils import git_state


def machine(uses_gpu: bool = True) -> str:
    """Returns one line: processor, cores and threads, GPU, versions, commit, and the load of the machine.

    Args:
        uses_gpu: whether the benchmark uses a GPU; if not, the line does not name it.
    """
    gpu = torch.cuda.get_device_name() if uses_gpu and torch.cuda.is_available() else "no GPU"
    state = git_state()
    commit = f"commit {str(state['commit'])[:7]}{' with changes' if state['changed'] else ''}" if state else "no commit"
    return (
        f"{_processor()}, {os.cpu_count()} cores of which PyTorch uses {torch.get_num_threads()}, {gpu}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {commit}; "
        f"load at the start {os.getloadavg()[0]:.1f}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
