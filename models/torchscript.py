"""The weights of a TorchScript archive, as OpenAI publishes CLIP's, read without running code from it.

PyTorch's reader compiles the program in such a file and runs parts of it while loading; a program can write files.
The weights do not need the program: they are plain bytes in a zip file, with a pickle that assigns them to modules.
This module reads that pickle with every name bound to an inert stand-in.
"""

import math
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
MAX_ENTRIES = 100_000  # attributes of all modules; a large CLIP has several thousand
DEEPEST_MODULE = 50  # nesting depth of modules


def is_torchscript(path: Path) -> bool:
    """Returns whether a file is a TorchScript archive and not a plain checkpoint."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript_weights(path: Path) -> dict[str, Tensor]:
    """Reads the parameters and buffers of an archive by their dotted names, as in its `state_dict`.

    Raises:
        Exception: the file is damaged; the exception may have any type.
    """
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(pickled) as file:
            module = _WeightsUnpickler(file, archive, pickled.removesuffix("data.pkl") + "data/").load()
    weights = dict(_entries(module))
    if not weights:
        raise ValueError("the archive contains no weights")
    return weights


class _StandIn:
    """A stand-in for every class and function in the pickle, which only stores attributes."""

    def __init__(self, *arguments: Any) -> None:
        self.attributes: Any = {}

    def __setstate__(self, attributes: Any) -> None:
        self.attributes = attributes


class _WeightsUnpickler(pickle.Unpickler):
    """An unpickler that builds tensors, and stand-ins for everything else."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Returns a stand-in for everything except tensors and their storages."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        return _StandIn

    def persistent_load(self, reference: Any) -> Tensor:
        """Returns the bytes of a storage as a tensor of one dimension."""
        _, dtype, key, _, count = reference
        if key not in self.storages:
            content = bytearray(self.archive.read(self.folder + key))
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        if len(self.storages[key]) != count:
            raise ValueError(f"part {key} of the archive does not have its declared length")
        return self.storages[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """Builds a tensor over a part of the bytes, which it never exceeds."""
    if math.prod(size) > storage.numel():
        raise ValueError("a tensor of the archive is larger than its data")
    return torch.as_strided(storage, size, stride, offset)


def _entries(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor in nested modules with its dotted name."""
    waiting, entries = [("", module, 0)], 0
    while waiting:
        prefix, inner, depth = waiting.pop()
        for name, value in inner.attributes.items():
            entries += 1
            if entries > MAX_ENTRIES or depth > DEEPEST_MODULE:
                raise ValueError("the archive has too many modules, or they are nested too deeply")
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, _StandIn):
                waiting.append((f"{prefix}{name}.", value, depth + 1))
