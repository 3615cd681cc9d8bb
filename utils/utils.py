"""Seeds, devices and versions."""

import functools
import logging
import os
import platform
import random
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from utils import distributed
from utils.errors import UserError, counted
from utils.schema import Config

DRIVER = Path("/proc/driver/nvidia/version")  # exists if a GPU can be used

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "open_clip_torch", "numpy", "decord", "av", "pillow")


def prepare_device(config: Config) -> torch.device:
    """Returns the device of a run, after setting determinism and the seeds; see `choose_device`."""
    device = choose_device(config.DEVICE.DEVICE)
    set_determinism(config.DEVICE.DETERMINISTIC)
    seed_everything(config.MODEL.SEED)
    return device


def seed_everything(seed: int) -> None:
    """Seeds the generators of weights and dropout. Data code has separate generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_determinism(is_deterministic: bool) -> None:
    """Sets whether PyTorch may only use operations that give the same bits in every run.

    If so, an operation without a deterministic implementation raises a RuntimeError that names it.
    """
    if is_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(is_deterministic)


def choose_device(name: str) -> torch.device:
    """Returns the device of DEVICE.DEVICE: auto, cuda or cpu. Each of several processes gets its GPU.

    Raises:
        UserError: an unknown name, cuda without a CUDA device, or fewer GPUs than processes on this machine.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "DEVICE.DEVICE is cuda but PyTorch sees no CUDA device; check the driver or set DEVICE.DEVICE=cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if torch.version.cuda is None and torch.version.hip is None and DRIVER.exists():
            logger.warning(
                "this machine has an NVIDIA GPU, but PyTorch %s is a CPU build: install the CUDA build to use it",
                torch.__version__,
            )
    if name not in ("cuda", "cpu"):
        raise UserError(f"expected auto, cuda or cpu as the device, found {name!r}")
    if name == "cpu" or distributed.world_size() == 1:
        return torch.device(name)
    gpus, number = torch.cuda.device_count(), distributed.local_rank()
    if number >= gpus:
        raise UserError(
            f"process {number + 1} of this machine has no GPU, found {counted(gpus, 'GPU')}; start as many processes "
            f"as there are GPUs (torchrun --nproc_per_node={gpus}), or set DEVICE.DEVICE=cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU, or `cpu` with the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {counted(torch.get_num_threads(), 'thread')}"


@functools.cache
def git_state() -> dict[str, str | bool] | None:
    """Returns the commit of this code and whether tracked files differ from it; None outside a git clone.

    The state of the first call is kept for the whole process, since the code was loaded then.
    """
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = [*git, "status", "--porcelain", "--untracked-files=no"]
        return {"commit": commit, "changed": bool(subprocess.run(changes, capture_output=True, check=True).stdout)}
    except (OSError, subprocess.CalledProcessError):
        return None


def package_versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that affect results; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
