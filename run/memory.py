"""Running out of memory, told with what takes it and what lowers it, the least harmful first."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.errors import UserError, reason_of
from utils.schema import Config

# What PyTorch's CPU allocator says, in its two ways, and CUDA and its libraries, which take memory themselves; for
# PyTorch's own on a GPU there is an exception.
MESSAGES = (
    "not enough memory", "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip
WORKER_MESSAGE = "DataLoader worker (pid"  # of one that was killed; what a living one raises begins otherwise


@contextmanager
def out_of_memory_told(describe: str, ways: list[str], device: torch.device) -> Iterator[None]:
    """Within this block, running out of memory becomes a UserError, also that of a process that reads videos.

    Args:
        describe: what is being done, with how much at once.
        ways: settings that lower the need, the least harmful first; empty ones are left out.
        device: where it is done.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if str(error).startswith(WORKER_MESSAGE):
            raise UserError(
                f"a process that reads videos was ended ({reason_of(error)}), mostly because the machine has no memory "
                "left, or no shared memory (/dev/shm, docker run --shm-size): lower DATA.NUM_WORKERS, or give it more"
            ) from error
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory and not any(message in str(error) for message in MESSAGES):
            raise
        raise UserError(
            f"out of memory {describe} on {device}, at a peak of {peak_gigabytes(device):.1f} GB: "
            f"try in this order {', '.join(filter(None, ways))}"
        ) from error


def building_ways(config: Config) -> tuple[str, list[str]]:
    """What is built before the first step, and what makes room for it."""
    return "while the model is built", [
        "a device on which nothing else runs",
        f"a MODEL.BACKBONE smaller than {config.MODEL.BACKBONE}",
    ]


def training_ways(config: Config) -> tuple[str, list[str]]:
    """What a training step has at once, and the settings that lower it."""
    train, length = config.TRAIN, config.DATA.SEQ_LEN
    videos = train.WAY * (train.SHOT + train.QUERY_PER_CLASS)
    at_once = min(videos, train.CHUNK or videos)
    of_backbone = [  # the first two leave the gradient as it is, the third rounds it
        f"TRAIN.CHUNK={at_once // 2}" if at_once > 1 else "",
        "" if config.MODEL.ACTIVATION_CHECKPOINTING else "MODEL.ACTIVATION_CHECKPOINTING=true",
        "" if config.USE_AMP else "USE_AMP=true",
    ]
    others = [f"a TRAIN.QUERY_PER_CLASS below {train.QUERY_PER_CLASS}", f"a DATA.SEQ_LEN below {length}"]
    if train.CACHED_FEATURES:  # no step has the backbone in it
        return f"in a training step with the features of {videos * length:,} frames", others
    what = f"in a training step with {videos * length:,} frames, {at_once * length:,} of them at once,"
    return what, of_backbone + others


def encoding_ways(config: Config, frames: int) -> tuple[str, list[str]]:
    """What the encoding of all training videos has at once, and the settings that lower it."""
    ways = ["" if config.USE_AMP else "USE_AMP=true", f"a DATA.SEQ_LEN below {config.DATA.SEQ_LEN}"]
    return f"while encoding all training videos with {frames:,} frames at once", ways


def evaluation_ways(config: Config, frames: int) -> tuple[str, list[str]]:
    """What an evaluation has at once, whose backbone takes `frames` at a time, and the settings that lower it."""
    ways = [
        f"a TEST.BATCH_EPISODES below {config.TEST.BATCH_EPISODES}",
        "" if config.USE_AMP else "USE_AMP=true",
        f"a DATA.SEQ_LEN below {config.DATA.SEQ_LEN}",
    ]
    at_once = f"{frames:,} frames or {config.TEST.BATCH_EPISODES} episodes at once"
    return f"in an evaluation with {at_once}", ways


def peak_gigabytes(device: torch.device) -> float:
    """The most memory that this process has taken so far on a device, in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
