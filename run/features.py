"""Features of videos; each video passes through the encoder once.

    encode_videos     the test clips of some videos -> FeatureBank, in the memory of the device
    FeatureCache      TEST.FEATURE_CACHE: the backbone's features of a split, stored in a folder and memory-mapped

Shapes: R rows of a bank, V videos, T frames, F the method's own feature shape.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from episodes.dataset import ClipReader
from episodes.splits import SplitIndex
from run import stopping
from run.bank_memory import bank_memory
from run.encoder import BackboneEncoder, Encoder
from run.feature_key import data_digest, describe_encoding
from utils import distributed
from utils.checkpoint import file_digest
from utils.errors import UserError
from utils.files import exclusive
from utils.jobs import progress
from utils.schema import Config

logger = logging.getLogger(__name__)

FRAMES_PER_BATCH = 512
# Videos that a worker reads at a time. The number is small so that all workers stay busy, even with a small split.
VIDEOS_PER_READ = 4
SECONDS_BETWEEN_LOOKS = 0.5  # while another run computes the same features

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
        """Returns the type of the features, "float32" or "bfloat16"."""
        return str(self.features.dtype).removeprefix("torch.")

    def take(self, rows: Tensor) -> Tensor:
        """Returns a copy of some rows, int64 of any shape: float32 [*rows.shape, T, *F], on the same device."""
        # On a CPU this copies whole rows, three times as fast as indexing with a tensor.
        return self.features.index_select(0, rows.flatten()).unflatten(0, rows.shape).float()


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


# --- features on disk -------------------------------------------------------------------------------------


class FeatureCache:
    """The folder TEST.FEATURE_CACHE, with one file for each split, backbone and kind of clip.

    The name of a file contains a hash of everything that its features depend on, see `describe_encoding` and
    `data_digest`. The matcher and the head are not part of it, so methods on the same backbone share a file. No file
    is deleted.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        """Creates the folder; raises UserError if that fails, before any work is done."""
        self.folder, self.config, self.device = Path(config.TEST.FEATURE_CACHE), config, device
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"TEST.FEATURE_CACHE: cannot create the folder {self.folder}: {error.strerror}; choose another one"
            ) from error

    def bank(self, encoder: BackboneEncoder, index: SplitIndex, reader: ClipReader) -> FeatureBank:
        """Returns the backbone's features of all videos of a split, read from the folder or encoded."""
        content = distributed.from_main(
            lambda: {**describe_encoding(self.config, encoder, self.device), "videos": data_digest(index)}
        )
        file = FeatureFile(self.folder, index.split, content)

        def encoded() -> Tensor:
            # Not `bank_memory`, which all processes call together.
            allocate = file.allocate if distributed.is_main() else partial(torch.empty, device=self.device)
            return encode_videos(encoder, index, range(len(index)), reader, allocate).features

        return FeatureBank(file.read_or(encoded), rows_of(range(len(index)), len(index)))


class FeatureFile:
    """Features in NAME.npy, float32 [V, ...], and in NAME.json their checksum and everything that they depend on."""

    def __init__(self, folder: Path, name: str, content: dict[str, Any]) -> None:
        self.content = content
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"features_{name}_{digest[:24]}.npy"
        # Other runs may write the same file. A run that is killed leaves its .part file behind.
        self.temporary = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.part")

    def version(self) -> int | None:
        """Returns when the features were written, or None if they are missing."""
        return self.path.stat().st_mtime_ns if self.path.exists() else None

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """Waits until no other run writes this file, with one log line; all processes call this together."""
        lock: list[AbstractContextManager[Any]] = []

        def reason_to_wait() -> str:
            try:
                lock.append(exclusive(self.path.with_suffix(".lock"), f"the file {self.path}", "stop it"))
            except UserError as error:
                return str(error)
            except OSError:  # the folder is not writable, so the features cannot be kept either
                pass
            return ""

        is_logged = False
        while reason := distributed.from_main(reason_to_wait):
            if not is_logged:
                logger.info("another run computes the same features: %s", reason)
                is_logged = True
            stopping.check()
            time.sleep(SECONDS_BETWEEN_LOOKS)
        with contextlib.ExitStack() as stack:
            for held in lock:
                stack.enter_context(held)
            yield

    def read_or(self, compute: Callable[[], Tensor], level: int = logging.INFO) -> Tensor:
        """Returns the features from the file, or keeps and returns those that `compute` returns.

        Of runs that start together, one computes and the others wait. All processes call this together.

        Args:
            compute: writes the features to the tensor of `allocate` and returns them.
            level: of the log line that names a file that was read.
        """
        version = distributed.from_main(self.version)
        if (features := self._read_by_all(level)) is not None:
            return features
        with self.only_writer():
            changed = distributed.from_main(self.version) != version  # by another run meanwhile
            if changed and (features := self._read_by_all(level)) is not None:
                return features
            try:
                features = compute()
                self.keep()
            finally:
                self.discard()
        return features

    def _read_by_all(self, level: int) -> Tensor | None:
        """Returns `read()`, or None if one of the processes cannot read the file."""
        features = self.read()
        all_have = all(distributed.gather(features is not None))
        if features is None or not all_have:
            return None
        logger.log(level, "features read from %s", self.path)
        return features

    def read(self) -> Tensor | None:
        """Returns the memory-mapped features, or None if the file is missing, damaged, or contains other features."""
        if not self.path.exists():
            return None
        try:
            is_whole = self.path.with_suffix(".json").read_bytes() == self._description(self.path)
        except OSError:
            is_whole = False
        if not is_whole:
            logger.warning("%s is damaged or belongs to other features: the features are computed again", self.path)
            return None
        return torch.from_numpy(np.load(self.path, mmap_mode="c"))  # copy on write: the file does not change

    def allocate(self, shape: Sequence[int]) -> Tensor:
        """Returns an uninitialised float32 tensor, mapped to the temporary file, or in memory if the disk is full."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            features = np.lib.format.open_memmap(self.temporary, "w+", np.float32, tuple(shape))
            if hasattr(os, "posix_fallocate"):  # if the disk filled up later, SIGBUS would kill the process
                with open(self.temporary, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, self.temporary.stat().st_size)
        except OSError as error:
            self.discard()
            self._warn_not_stored(error)
            return torch.empty(*shape)
        return torch.from_numpy(features)

    def keep(self) -> None:
        """Renames the temporary file, if there is one, to its final name; a failure is only a warning."""
        if not self.temporary.exists():
            return
        try:
            # Between these two lines `read` rejects an older file, since its checksum differs.
            self.path.with_suffix(".json").write_bytes(self._description(self.temporary))
            os.replace(self.temporary, self.path)
            logger.debug("features kept in %s", self.path)
        except OSError as error:
            self._warn_not_stored(error)

    def discard(self) -> None:
        """Deletes the temporary file, if there is one."""
        with contextlib.suppress(OSError):
            self.temporary.unlink()

    def _description(self, path: Path) -> bytes:
        return json.dumps({**self.content, "sha256": file_digest(path)}, indent=1, sort_keys=True).encode()

    def _warn_not_stored(self, error: OSError) -> None:
        reason = error.strerror or error
        logger.warning("cannot write %s (%s); the features are not kept", self.path, reason)
