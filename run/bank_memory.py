"""Allocates the features of many videos: float32 on the device, if they take at most half of its free memory.

Larger features are stored in bf16, which halves their size. If a GPU is still too small, they are stored in host
memory. Computation is always in float32, so only the rounding of the features changes the scores.
"""

import contextlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils import distributed

logger = logging.getLogger(__name__)

SHARE = 0.5  # fraction of the free memory
MEMINFO = Path("/proc/meminfo")


def bank_memory(shape: Sequence[int], device: torch.device) -> Tensor:
    """Returns an uninitialised tensor for features; all processes call this together and get the same type.

    Args:
        shape: shape of the features; the first dimension is R.
        device: where the features are used.

    Returns:
        float32 or bfloat16 on the device, or bfloat16 on the CPU.
    """
    if _fits(shape, torch.float32, device):
        return torch.empty(*shape, device=device)
    place = device if device.type == "cpu" or _fits(shape, torch.bfloat16, device) else torch.device("cpu")
    logger.warning(
        "the features of %d videos take %.1f GB in float32, more than half of the free memory: kept in bf16 on the %s, "
        "so scores differ by rounding", shape[0], math.prod(shape) * torch.float32.itemsize / 1e9, place.type,
    )  # fmt: skip
    return torch.empty(*shape, dtype=torch.bfloat16, device=place)


def _fits(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> bool:
    free = free_memory(device)
    fits = free is None or math.prod(shape) * dtype.itemsize <= SHARE * free
    return all(distributed.gather(fits))


def free_memory(device: torch.device) -> int | None:
    """Returns how many bytes are free for new tensors on a device, or None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with contextlib.suppress(OSError):
        for line in MEMINFO.read_text().splitlines():
            if device.type == "cpu" and line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
