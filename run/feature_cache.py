"""The backbone's features of test clips, kept in a folder (TEST.FEATURE_CACHE) from one run to the next.

A file holds the features of all videos of a split, and what they depend on: the weights that the backbone reads, what
it returns for a trial clip, clips, device, code, package versions, and size and modification time of each video. If
any of these differs, the file is another one. A matcher or a head is not among them: methods on the same backbone
share a file. Files are in the safetensors format, written whole or not at all, and never deleted: the folder is the
user's.

Shapes: V videos of a split, F the backbone's own feature shape.
"""

import contextlib
import hashlib
import inspect
import json
import logging
import os
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from episodes.splits import SplitIndex
from models.base import FewShotModel
from run.feature_bank import fits, size_in_bytes
from utils import distributed
from utils.errors import UserError
from utils.schema import Config
from utils.utils import package_versions

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
FORMAT = "few-shot action recognition features 2"
CLIP_KEYS = ("SEQ_LEN", "SAMPLING", "IMG_SIZE", "SHORT_SIDE", "IMG_NORM")
# The code between a video and its features.
CODE = ("models/*.py", "episodes/*.py", "videotransforms/*.py", "run/encoder.py", "run/evaluation.py")
LENGTH = struct.Struct("<Q")  # of the header, in bytes: how a safetensors file begins
LONGEST_HEADER = 1 << 20
ALIGNMENT = 8
BLOCK = 1 << 24  # bytes hashed or written at a time
UNKNOWN_DIGEST = "0" * 64


Encode = Callable[[Tensor], Tensor]


class FeatureCache:
    """The folder of the features."""

    def __init__(self, config: Config, device: torch.device) -> None:
        """Creates the folder that the config names, so that a long run does not end with the news that it cannot.

        Raises:
            UserError: it cannot be created.
        """
        self.folder, self.config, self.device = Path(config.TEST.FEATURE_CACHE), config, device
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"TEST.FEATURE_CACHE: cannot create the folder {self.folder}: {error.strerror}; name another one"
            ) from error

    def entry(self, model: FewShotModel, encode: Encode, index: SplitIndex) -> "CacheEntry":
        """Returns the file for a split, as its videos and the weights are now.

        Args:
            model: in evaluation mode.
            encode: uint8 clips [V, T, 3, H, W] -> float32 [V, *F], what the model's backbone makes of them.
            index: the split.
        """
        content = distributed.from_main(
            lambda: {**describe_encoding(self.config, model, encode, self.device), "videos": data_digest(index)}
        )
        text = json.dumps(content, sort_keys=True)
        name = f"features_{index.split}_{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"
        return CacheEntry(self.folder / name, text, len(index), self.device)


@dataclass(frozen=True)
class CacheEntry:
    """One file, which need not exist yet. content: what its features depend on, as JSON. videos: V."""

    path: Path
    content: str
    videos: int
    device: torch.device

    def load(self) -> Tensor | None:
        """The features, float32 [V, T, *F], on the device or, where they do not fit, memory-mapped.

        Returns:
            None, on every process, if the file is missing or damaged for one of them.

        Raises:
            UserError: the file is none of ours, so that it can neither be used nor replaced.
        """
        features = self._read()
        return features if all(distributed.gather(features is not None)) else None

    def _read(self) -> Tensor | None:
        if not self.path.exists():
            return None
        start, header = _read_header(self.path)
        metadata, shape = header["__metadata__"], header["features"]["shape"]
        if metadata["content"] != self.content or shape[0] != self.videos:
            raise _foreign(self.path)
        if not _is_whole(self.path, start, shape, metadata["sha256"]):
            logger.warning("%s is damaged; its features are computed again", self.path)
            return None
        logger.info("features of %d videos from %s", self.videos, self.path)
        features = _mapped(self.path, start, shape)
        return features.to(self.device) if fits(shape, self.device) else features

    def save(self, features: Tensor) -> None:
        """Writes the file, on the main process; a test that cannot write it goes on without."""
        if not distributed.is_main():
            return
        temporary = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.part")  # others may write the same file
        try:
            with open(temporary, "xb") as file:
                file.write(_header(features, self.content, UNKNOWN_DIGEST))
                digest = hashlib.sha256()
                for block in _blocks(features):
                    file.write(block)
                    digest.update(block)
                file.seek(0)
                file.write(_header(features, self.content, digest.hexdigest()))  # of the same length
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            logger.warning(
                "TEST.FEATURE_CACHE: cannot write %s (%s); the features are not kept", self.path, error.strerror
            )
            return
        logger.info("features of %d videos kept in %s", self.videos, self.path)


# --- what features depend on ------------------------------------------------------------------------------


def describe_encoding(config: Config, model: FewShotModel, encode: Encode, device: torch.device) -> dict[str, Any]:
    """Everything that the features of a given clip depend on, plain values only.

    The weights that `encode` reads are found by a trial. Its result stands for everything that is not a weight: options
    of the backbone, normalisation, precision. Hardware that computes other bits makes a file of its own.
    """
    size = config.DATA.IMG_SIZE
    noise = torch.Generator().manual_seed(0)
    clip = torch.randint(256, (1, config.DATA.SEQ_LEN, 3, size, size), dtype=torch.uint8, generator=noise)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _TensorsRead() as read:
        features = encode(clip)
    weights = [tensor for tensor in model.state_dict().values() if tensor.untyped_storage().data_ptr() in read.places]
    return {
        "weights": tensors_digest(weights),
        "trial": tensors_digest([features]),
        "clips": {key: getattr(config.DATA, key) for key in CLIP_KEYS},
        "compiled": config.MODEL.COMPILE,
        "device": device.type,
        "code": code_digest(model),
        "versions": package_versions(),
    }


class _TensorsRead(TorchDispatchMode):
    """Notes where the tensors lie that the operations within it read, weights and buffers among them."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.places |= {tensor.untyped_storage().data_ptr() for tensor in arguments}
        return operation(*args, **(kwargs or {}))


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the types, shapes and values of tensors in their order; methods give them different names."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def code_digest(model: FewShotModel) -> str:
    """SHA-256 of the code between a video and its features; the method may be of another project."""
    files = {path for pattern in CODE for path in ROOT.glob(pattern)}
    source = inspect.getsourcefile(type(model))
    digest = hashlib.sha256()
    for path in sorted(files | ({Path(source)} if source else set())):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def data_digest(index: SplitIndex) -> str:
    """SHA-256 of where the videos lie and of size and modification time of each of their files."""
    digest = hashlib.sha256(os.fsencode(index.root.resolve()))
    for video, path in enumerate(index.video_paths):
        digest.update(json.dumps([path, _file_states(index.path(video))]).encode())
    return digest.hexdigest()


def _file_states(path: Path) -> list[tuple[str, int, int]]:
    """Name, size in bytes and modification time of a video file, of each image of a folder, or of the file it is in.

    A video of a packed store has a path that goes on below the store's.
    """
    if os.path.isdir(path):
        files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]  # rgb/ below it too
        states = [(os.path.relpath(file, path), file.stat()) for file in files]
        return sorted((name, state.st_size, state.st_mtime_ns) for name, state in states)
    file = next(place for place in (path, *path.parents) if os.path.exists(place))
    state = file.stat()
    return [("", state.st_size, state.st_mtime_ns)]


# --- the file ---------------------------------------------------------------------------------------------


def _header(features: Tensor, content: str, digest: str) -> bytes:
    """The beginning of a safetensors file with one tensor, filled up with blanks so that the values are aligned."""
    header = {
        "__metadata__": {"format": FORMAT, "content": content, "sha256": digest},
        "features": {
            "dtype": "F32",
            "shape": list(features.shape),
            "data_offsets": [0, size_in_bytes(features.shape)],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return LENGTH.pack(len(text)) + text


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the values of a file begin, in bytes, and its header.

    Raises:
        UserError: the file was not written by `CacheEntry.save`.
    """
    try:
        with open(path, "rb") as file:
            (length,) = LENGTH.unpack(file.read(LENGTH.size))
            header = json.loads(file.read(min(length, LONGEST_HEADER)))
        features, metadata = header["features"], header["__metadata__"]
        ours = metadata["format"] == FORMAT and features["dtype"] == "F32" and {"content", "sha256"} <= set(metadata)
        is_shape = all(type(size) is int and size > 0 for size in features["shape"]) and features["shape"]
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise _foreign(path) from error
    if not (ours and is_shape):
        raise _foreign(path)
    return LENGTH.size + length, header


def _foreign(path: Path) -> UserError:
    return UserError(
        f"TEST.FEATURE_CACHE: {path} has the name of a file of features but was not written by a test like this one; "
        f"move it away or name another folder"
    )


def _is_whole(path: Path, start: int, shape: list[int], expected_digest: str) -> bool:
    """Whether the file has the length that its header gives, and values with the digest that its header gives."""
    if path.stat().st_size != start + size_in_bytes(shape):
        return False
    digest = hashlib.sha256()
    for block in _blocks(_mapped(path, start, shape)):
        digest.update(block)
    return digest.hexdigest() == expected_digest


def _mapped(path: Path, start: int, shape: list[int]) -> Tensor:
    """The values, memory-mapped: float32 of the given shape. Copied on write: no use of them can reach the file."""
    return torch.from_numpy(np.memmap(path, np.float32, "c", offset=start, shape=tuple(shape)))


def _blocks(features: Tensor) -> Iterator[memoryview]:
    """The values, a few rows at a time, as bytes."""
    rows = max(1, BLOCK // size_in_bytes(features.shape[1:]))
    for part in features.split(rows):
        yield part.cpu().contiguous().numpy().data.cast("B")
