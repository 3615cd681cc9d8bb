"""Features of videos in memory; each video passes through the encoder once.

    encode_videos    the test clips of some videos -> FeatureBank, on the device
    bank_memory      memory for the rows of a bank

`run/feature_cache.py` keeps features on disk, `run/cached_episodes.py` trains on them.

Shapes: R rows of a bank, V videos, T frames, F the method's own feature shape.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from episodes.dataset import ClipReader
from episodes.splits import SplitIndex
from run import stopping
from run.encoder import Encoder
from utils import distributed
from utils.errors import UserError
from utils.jobs import progress

logger = logging.getLogger(__name__)

FRAMES_PER_BATCH = 512
# Videos that a worker reads at a time. The number is small so that all workers stay busy, even with a small split.
VIDEOS_PER_READ = 4
VIDEOS_PER_CALL = 128  # of `FeatureBank.map`
SHARE = 0.5  # fraction of the free memory that a bank may take in float32
MEMINFO = Path("/proc/meminfo")

Allocate = Callable[[Sequence[int]], Tensor]  # shape -> uninitialised tensor, float32 or bfloat16


@dataclass(frozen=True)
class FeatureBank:
    """Features of some videos of a split.

    features: float32 or bfloat16 [R, T, *F], on the device, on the CPU, or memory-mapped there.
    row_of_video: int64, the row of each video of the split, -1 for a video that is not in the bank.
    """

    features: Tensor
    row_of_video: np.ndarray

    def rows(self, videos: np.ndarray) -> Tensor:
        """Returns the rows of videos: int64 of the same shape, on the features' device, without waiting for it."""
        rows = self.row_of_video[videos]
        assert (rows >= 0).all(), "a video was not encoded"
        return torch.from_numpy(rows).to(self.features.device, non_blocking=True)

    @property
    def stored_in(self) -> str:
        """The type of the features, "float32" or "bfloat16"."""
        return str(self.features.dtype).removeprefix("torch.")

    def take(self, rows: Tensor) -> Tensor:
        """Returns a copy of some rows, int64 of any shape: float32 [*rows.shape, T, *F], on the same device."""
        # On a CPU this copies whole rows, three times as fast as indexing with a tensor.
        return self.features.index_select(0, rows.flatten()).unflatten(0, rows.shape).float()

    @torch.no_grad()
    def map(
        self, function: Callable[[np.ndarray, Tensor], Tensor], videos: Sequence[int], device: torch.device
    ) -> "FeatureBank":
        """Returns the bank of `function(videos int64 [V], features float32 [V, T, *F])`, computed in batches.

        For a function that returns the given features, this is the bank itself.
        """
        results = torch.empty(0)
        for start in range(0, len(videos), VIDEOS_PER_CALL):
            chosen = np.asarray(videos[start : start + VIDEOS_PER_CALL])
            features = self.take(self.rows(chosen)).to(device)
            result = function(chosen, features)
            if result is features:
                return self
            if not start:
                results = bank_memory((len(videos), *result.shape[1:]), device)
            results[start : start + len(result)] = result
        return FeatureBank(results, rows_of(videos, len(self.row_of_video)))


def rows_of(videos: Sequence[int], total: int) -> np.ndarray:
    """Returns the row of each video of a split for a bank that holds `videos` in this order: int64 [total]."""
    rows = np.full(total, -1, dtype=np.int64)
    rows[np.asarray(videos, dtype=np.int64)] = np.arange(len(videos))  # `videos` may be empty
    return rows


# --- encoding ---------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_videos(
    encoder: Encoder, index: SplitIndex, videos: Sequence[int], reader: ClipReader, allocate: Allocate | None = None
) -> FeatureBank:
    """Encodes the test clip of each video once; the model must be in evaluation mode.

    Several processes share the work: each encodes some of the videos and receives the features of all.

    Args:
        encoder: turns clips into features.
        index: the split.
        videos: numbers of the videos in the split, in the order of the rows.
        reader: reads the clips.
        allocate: returns the tensor for the features; by default `bank_memory` on the device.

    Raises:
        UserError: a video is unreadable.
    """
    own = _own_videos(videos)
    batch_size = max(1, FRAMES_PER_BATCH // reader.options.length)
    read_size = min(batch_size, VIDEOS_PER_READ)
    reads = reader.loader(index, own, read_size, encoder.device)
    batches = progress(
        _joined(reads, batch_size // read_size, encoder.device),
        math.ceil(len(reads) / (batch_size // read_size)), f"encode {index.split}", unit="batch",
    )  # fmt: skip
    features, row = torch.empty(0), 0
    for clips in batches:  # the same number on each process
        stopping.check()
        encoded = distributed.gather_rows(encoder(clips))[: len(videos) - row]
        if not row:
            allocate = allocate or partial(bank_memory, device=encoder.device)
            features = allocate((len(videos), *encoded.shape[1:]))
        features[row : row + len(encoded)] = encoded
        row += len(encoded)
    return FeatureBank(features, rows_of(videos, len(index)))


def _joined(reads: Iterable[Tensor], count: int, device: torch.device) -> Iterator[Tensor]:
    """Yields batches of `count` reads each, on the device: uint8 [V, T, 3, H, W]."""
    iterator = iter(reads)
    while group := list(islice(iterator, count)):
        yield torch.cat([clips.to(device, non_blocking=True) for clips in group])


def _own_videos(videos: Sequence[int]) -> list[int]:
    """Returns this process's share of the videos, equally many for each process: the last may repeat the first."""
    processes = distributed.world_size()
    each = math.ceil(len(videos) / processes)
    return [videos[i % len(videos)] for i in range(distributed.rank(), each * processes, processes)]


# --- memory -----------------------------------------------------------------------------------------------


def bank_memory(shape: Sequence[int], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Returns an uninitialised tensor for features; all processes call this together and get the same type.

    Features that take more than half of the free memory are stored in bf16, which halves their size, and on the CPU if
    a GPU is still too small. Computation is always in float32, so only the rounding of the features changes the scores.
    Results and checkpoints record the type.

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
