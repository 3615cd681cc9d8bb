"""Reads weights from files of other programs: finds the state dict, removes wrappers from names, checks values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from utils.errors import UserError, counted

# Keys under which training code stores a state dict.
STATE_KEYS = ("model_state_dict", "state_dict", "model_state", "model")
# Prefixes that DataParallel, Lightning Fabric, torch.compile, FSDP and activation checkpointing add to module names.
WRAPPERS = {"module", "_forward_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the weights of a TorchScript archive, a safetensors file, or a state dict, bare or within a checkpoint.

    Returns:
        name without wrappers -> tensor on the CPU, as stored.

    Raises:
        UserError: two entries are the same weight.
        Exception: the file has another form or is damaged; the exception may have any type.
    """
    from models.torchscript import is_torchscript, read_torchscript_weights  # models import utils.checkpoint

    if is_torchscript(path):
        weights: Any = read_torchscript_weights(path)
    elif path.suffix == ".safetensors":
        weights = safetensors.torch.load_file(path)
    else:
        weights = state_dict_of(torch.load(path, map_location="cpu", weights_only=True), path)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError("it contains no mapping from names to tensors")
    return unwrapped(weights, path)


def state_dict_of(content: Any, path: Path) -> Any:
    """Returns the state dict within a checkpoint, or the content itself if there is none in it.

    Raises:
        UserError: it contains the weights of several models.
    """
    if not isinstance(content, dict):
        return content
    keys = [key for key in STATE_KEYS if isinstance(content.get(key), dict)]
    full = [key for key in keys if content[key] and all(isinstance(value, Tensor) for value in content[key].values())]
    if len(full) > 1:
        raise UserError(f"{path}: contains weights under {' and '.join(full)}; save a file with one of them")
    return content[(full or keys)[0]] if keys else content


def unwrapped(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Returns the weights with wrappers removed from their names: `module.a._orig_mod.b` becomes `a.b`.

    Leading levels that all names share also belong to a wrapper, such as Lightning's `model.`.

    Raises:
        UserError: two entries would get the same name.
    """
    origins: dict[str, str] = {}
    for name in weights:
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if plain in origins:
            raise UserError(
                f"{path}: {origins[plain]} and {name} are the same weight with and without the wrapper of a "
                "parallel or compiled model; save the state dict of one model"
            )
        origins[plain] = name
    while len(origins) > 1 and len({name.partition(".")[:2] for name in origins}) == 1:
        origins = {name.partition(".")[2]: origin for name, origin in origins.items()}
    return {plain: weights[name] for plain, name in origins.items()}


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the weights with NaN or infinity."""
    return [
        name
        for name, value in weights.items()
        if value.is_floating_point() and not value.float().isfinite().all()  # float64 may exceed float32
    ]


def raise_if_not_finite(weights: Mapping[str, Tensor], source: str, advice: str) -> None:
    """Raises a UserError with the source and the first weight with NaN or infinity, if there is one."""
    if invalid := not_finite(weights):
        raise UserError(
            f"{source}: numbers that are not finite in {len(invalid)} of {counted(len(weights), 'weight')}, "
            f"for example in {invalid[0]}; {advice}"
        )


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Counts the weights that are missing, unknown, or of another shape or type: a phrase with an example for each."""
    common = [name for name in expected if name in found]
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another shape": [n for n in common if expected[n].shape != found[n].shape],
        "not of a floating-point type": without_fraction(expected, found),
    }
    return [f"{len(names)} {kind}, for example {names[0]}" for kind, names in kinds.items() if names]


def without_fraction(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of weights with integer, complex or boolean values, which PyTorch would cast silently."""
    return [n for n in expected if n in found and expected[n].is_floating_point() and not found[n].is_floating_point()]


def load_exactly(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads a file's weights; raises an exception if names, shapes or types do not fit the model."""
    if wrong := without_fraction(model.state_dict(), weights):
        raise TypeError(f"{len(wrong)} of its entries are not floating-point numbers, for example {wrong[0]}")
    model.load_state_dict(weights)
