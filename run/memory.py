"""Running out of memory, told with what takes it and what lowers it."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.errors import UserError

# What PyTorch's CPU allocator says, in its two ways; on a GPU there is an exception of its own.
CPU_MESSAGES = ("not enough memory", "can't allocate memory")


@contextmanager
def out_of_memory_told(what: str, frames: int, ways: str, device: torch.device) -> Iterator[None]:
    """Within this block, running out of memory becomes a UserError.

    Args:
        what: was being done.
        frames: images that went through the backbone at once.
        ways: the settings that lower the need, the least harmful first.
        device: where it was done.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(_sentence(what, frames, ways, device)) from error
    except RuntimeError as error:
        if not any(message in str(error) for message in CPU_MESSAGES):
            raise
        raise UserError(_sentence(what, frames, ways, device)) from error


def _sentence(what: str, frames: int, ways: str, device: torch.device) -> str:
    return (
        f"out of memory {what} with {frames:,} frames at once on {device} (peak {peak_gigabytes(device):.1f} GB); "
        f"in this order, set {ways}"
    )


def peak_gigabytes(device: torch.device) -> float:
    """The most memory that this process has taken so far on a device, in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
