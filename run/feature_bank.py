"""Features of many videos at once: on the device where they fit, else memory-mapped.

Shapes: R rows, one for each video; T frames, F the method's own feature shape.
"""

import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.free_memory import free_memory

logger = logging.getLogger(__name__)

# A bank may take this share of the memory that is free when it is made; the rest is for the scores' intermediates.
SHARE_OF_FREE_MEMORY = 0.5
BYTES_PER_VALUE = 4  # float32


@dataclass(frozen=True)
class FeatureBank:
    """Features of some videos of a split.

    features: float32 [R, T, *F], on the device or memory-mapped on the CPU.
    row_of_video: int64, for each video of the split its row, -1 for a video that is not in the bank.
    """

    features: Tensor
    row_of_video: np.ndarray

    def rows(self, videos: np.ndarray) -> Tensor:
        """Where videos lie: int64 of the shape of `videos`, on the features' device, for which nobody waits."""
        rows = self.row_of_video[videos]
        assert (rows >= 0).all(), "a video was not encoded"
        return torch.from_numpy(rows).to(self.features.device, non_blocking=True)

    def take(self, rows: Tensor) -> Tensor:
        """The features of videos by their rows, int64 of any shape: float32 [*rows, T, *F], where the bank lies."""
        # On a CPU this copies whole rows, three times as fast as indexing with a tensor.
        return self.features.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def rows_of(videos: Sequence[int], total: int) -> np.ndarray:
    """The rows of videos that lie in a bank in this order, among `total` videos of a split: int64 [total]."""
    rows = np.full(total, -1, dtype=np.int64)
    rows[np.asarray(videos, dtype=np.int64)] = np.arange(len(videos))  # there may be none
    return rows


def new_features(shape: Sequence[int], device: torch.device) -> Tensor:
    """Uninitialised float32 [R, T, *F]: on the device where it fits, else memory-mapped in a temporary file.

    The file has no name, so that it is gone with the tensor whatever happens; TMPDIR says in which folder it lies.

    Raises:
        UserError: the features fit neither into the memory nor on that disk.
    """
    if fits(shape, device):
        return torch.empty(*shape, device=device)
    gigabytes = size_in_bytes(shape) / 1e9
    try:
        features = _new_mapped(shape)
    except OSError as error:
        raise UserError(
            f"{gigabytes:.1f} GB of features do not fit into half of the free memory of {device}, nor into the folder "
            f"for temporary files ({error.strerror}): set the environment variable TMPDIR to one with as much space"
        ) from error
    logger.info(
        "%.1f GB of features do not fit into half of the free memory of %s: memory-mapped in %s",
        gigabytes, device, tempfile.gettempdir(),
    )  # fmt: skip
    return features


def _new_mapped(shape: Sequence[int]) -> Tensor:
    """Memory-mapped in a file without a name, whose place on the disk is taken at once.

    Without that a disk that is full later on would end the process by a signal (SIGBUS), without a word.
    """
    with tempfile.TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(file.fileno(), 0, size_in_bytes(shape))
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=tuple(shape)))


def fits(shape: Sequence[int], device: torch.device) -> bool:
    """Whether float32 values of this shape take at most SHARE_OF_FREE_MEMORY of a device."""
    return size_in_bytes(shape) <= SHARE_OF_FREE_MEMORY * free_memory(device)


def size_in_bytes(shape: Sequence[int]) -> int:
    """What float32 values of this shape take."""
    return BYTES_PER_VALUE * math.prod(shape)
