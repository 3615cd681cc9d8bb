"""Checkpoints: tensors and plain values only, written atomically, read without running code."""

import contextlib
import hashlib
import math
import os
import pickle
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from utils.errors import LONGEST_REASON, UserError, reason_of
from utils.files import FROM_TRAINING, raise_if_lfs_pointer, raise_if_missing
from utils.weights import STATE_KEYS, differences, raise_if_not_finite, state_dict_of, unwrapped

FORMAT = 1
STATE = "model_state_dict"  # where the released code keeps the weights
PROGRAM_BYTES = 4 * 1024**2  # a TorchScript archive stores tensors uncompressed and its program compressed
MAX_EPISODES = 2**53  # JSON readers keep smaller integers exactly
DEEPEST_NESTING = 20  # levels of the config in a checkpoint; usual ones have three or four
LAST = "checkpoint_last.pt"
BEST = "checkpoint_best.pt"

# These rebuild a NumPy scalar, in which the released code stores its accuracy. They are harmless, and the only objects
# allowed besides tensors and plain values. NumPy 2 moved the function, so files contain either name.
_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_SCALARS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
]


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint so that `path` holds either the old or the new one at any moment.

    Raises:
        UserError: the file cannot be written, for example because the disk is full; `path` is untouched.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {reason_of(error)}; the previous checkpoint is untouched") from error


def load_checkpoint(path: Path, expected: str = FROM_TRAINING) -> dict[str, Any]:
    """Reads a checkpoint of this framework or of released code to the CPU; accepts only tensors and plain values.

    A checkpoint of released code may contain only weights, written by torch.save or safetensors.

    Args:
        path: the checkpoint.
        expected: describes the file in the message for a path that does not exist.

    Returns:
        its content.

    Raises:
        UserError: no such file, damaged, not a checkpoint, or it contains Python objects.
    """
    raise_if_missing(path, expected)
    raise_if_lfs_pointer(path)
    try:
        check_archive(path)
        content = _read(path)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, because it is damaged or contains Python objects, which could run code when read "
            f"({reason_of(error)}); name a checkpoint, or copy or download the file again"
        ) from error
    except Exception as error:  # damaged bytes make the reader raise many types of errors
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({reason_of(error)}); copy it again or use another one"
        ) from error
    if not isinstance(content, dict):
        raise _not_a_checkpoint(path, content)
    if "format" not in content:
        return _released_content(content, path)
    if type(content["format"]) is not int or content["format"] != FORMAT:
        raise _not_a_checkpoint(path, content)
    _check_content(content, path)
    return content


def _read(path: Path) -> Any:
    """Reads a file: the content that torch.save wrote, or the weights in a safetensors file."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix in (".npz", ".npy"):
        raise ValueError("it contains NumPy arrays; save the state dict with torch.save or as safetensors")
    with torch.serialization.safe_globals(NUMPY_SCALARS):
        return torch.load(path, map_location="cpu", weights_only=True)


def _released_content(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns a checkpoint of released code, or a bare state dict, with its weights under STATE, unwrapped."""
    state = state_dict_of(content, path)
    if state is content:
        if not content or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise _not_a_checkpoint(path, content)
        content = {}
    content = {**content, STATE: state}
    _check_content(content, path)
    return {**content, STATE: unwrapped(state, path)}


def _not_a_checkpoint(path: Path, content: Any) -> UserError:
    names = ", ".join(map(str, list(content)[:3])) if isinstance(content, dict) else ""
    found = f"the keys {names}" if names else type(content).__name__
    return UserError(
        f"{path}: not a checkpoint of this framework ('format: {FORMAT}') nor of released code (weights alone, or "
        f"under {', '.join(STATE_KEYS)}); found {textwrap.shorten(found, LONGEST_REASON, placeholder=' ...')}"
    )


def check_archive(path: Path) -> None:
    """Checks that a zip file is intact and does not unpack to far more than its size.

    PyTorch does not compare the checksums of an archive, so a single wrong byte would silently change a weight.

    Raises:
        ValueError: it unpacks to far more, or a checksum is wrong.
        Exception: the file is damaged; the exception may have any type.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
        size = path.stat().st_size
        if unpacked > 2 * size + PROGRAM_BYTES:  # its parts are compressed, or overlap
            raise ValueError(f"a file of {size:,} bytes that unpacks to {unpacked:,}")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it does not match its checksum")


def _check_content(content: dict[str, Any], path: Path) -> None:
    """Raises UserError for a checkpoint without the entries that every reader requires."""
    is_own = "format" in content
    weights = content.get("model" if is_own else STATE)
    is_state = isinstance(weights, dict) and all(
        isinstance(name, str) and is_plain_tensor(value) for name, value in weights.items()
    )
    if not is_state:
        raise UserError(
            f"{path}: the checkpoint contains no weights (a mapping from names to tensors); use another one"
        )
    config = content.get("config")
    episodes = content.get("episode") if is_own else content.get("iteration", 0)  # its name in the released code
    config_is_known = not is_own or config is None or (isinstance(config, dict) and _is_plain_section(config))
    selected_is_known = isinstance(content.get("selected_on", ""), str)
    has_episodes = type(episodes) is int and 0 <= episodes < MAX_EPISODES
    if not (has_episodes and config_is_known and selected_is_known and (not is_own or _results_are_known(content))):
        raise UserError(
            f"{path}: the checkpoint does not describe its training run (episode or iteration, config, selected_on, "
            "best_accuracy, bad_clips, cached_in); use another one"
        )


def _results_are_known(content: dict[str, Any]) -> bool:
    """Returns whether the entries that results.json repeats are plain; a resumed run checks the whole state."""
    bad_clips, cached_in = content.get("bad_clips", {}), content.get("cached_in")
    best = content.get("best_accuracy", -1.0)
    return (
        isinstance(bad_clips, dict)
        and all(isinstance(name, str) for name in bad_clips)
        and (cached_in is None or isinstance(cached_in, str))
        and type(best) in (int, float)
        and math.isfinite(best)
    )


def is_plain_tensor(value: Any) -> bool:
    """Returns whether a value is a dense tensor of real numbers on the CPU."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex())
    )


def _is_plain_section(value: Any, depth: int = 0) -> bool:
    """Returns whether a value is a config section: names, plain values, lists of these, and sections."""
    if isinstance(value, dict):
        return depth < DEEPEST_NESTING and all(
            isinstance(name, str) and _is_plain_section(inner, depth + 1) for name, inner in value.items()
        )
    if isinstance(value, list):
        return depth < DEEPEST_NESTING and all(_is_plain_section(inner, depth + 1) for inner in value)
    return isinstance(value, str | int | float | None)


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path, must_be_finite: bool = True) -> None:
    """Loads weights that must fit the model exactly.

    Raises:
        UserError: names or shapes differ, or numbers are not finite; the message names the first of each kind.
    """
    if found := differences(model.state_dict(), weights):
        raise UserError(
            f"{path}: the weights do not fit this model ({'; '.join(found)}); "
            f"use the config that the checkpoint was trained with (MODEL.NAME, MODEL.BACKBONE, the modules' ENABLED)"
        )
    if must_be_finite:
        raise_if_not_finite(weights, str(path), "use a checkpoint from before the run diverged")
    model.load_state_dict(weights)


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
