"""Allocates the features of many videos: float32 on the device, if they take at most half of its free memory.

Larger features are stored in bf16, which halves their size. If a GPU is still too small, they are stored in host
memory. Computation is always in float32, so only the rounding of the features changes the scores. Results and
checkpoints record the type.
"""

import contextlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils import distributed
from utils.errors import UserError

logger = logging.getLogger(__name__)

SHARE = 0.5  # fraction of the free memory
MEMINFO = Path("/proc/meminfo")


def bank_memory(shape: Sequence[int], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Returns an uninitialised tensor for features; all processes call this together and get the same type.

    Args:
        shape: shape of the features; the first dimension is R.
        device: where the features are used.
        dtype: float32 or bfloat16, as in an earlier part of the run; None: chosen from the free memory.

    Returns:
        float32 or bfloat16 on the device, or bfloat16 on the CPU.

    Raises:
        UserError: the features take more than the free memory, even in bf16 on the CPU.
    """
    if dtype == torch.float32 or (dtype is None and _fits(shape, torch.float32, device, SHARE)):
        return torch.empty(*shape, device=device)
    place = device if _fits(shape, torch.bfloat16, device, SHARE) else torch.device("cpu")
    gigabytes = math.prod(shape) * torch.float32.itemsize / 1e9
    if not _fits(shape, torch.bfloat16, place, 1.0):
        raise UserError(
            f"the features of {shape[0]} videos take {gigabytes / 2:.1f} GB in bf16, more than the free memory of the "
            "host: test fewer episodes (TEST.TEST_EPISODES, TRAIN.VAL_EPISODES), set TRAIN.CACHED_FEATURES to false, "
            "or keep the backbone's features on disk with TEST.FEATURE_CACHE"
        )
    logger.warning(
        "the features of %d videos take %.1f GB in float32, more than half of the free memory: kept in bf16 on the %s, "
        "so scores differ by rounding", shape[0], gigabytes, place.type,
    )  # fmt: skip
    return torch.empty(*shape, dtype=torch.bfloat16, device=place)


def _fits(shape: Sequence[int], dtype: torch.dtype, device: torch.device, share: float) -> bool:
    free = free_memory(device)
    fits = free is None or math.prod(shape) * dtype.itemsize <= share * free
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
