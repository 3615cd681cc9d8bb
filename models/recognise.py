"""Identifies the method and the backbone of a released checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from math import isqrt
from pathlib import Path

import open_clip
import torch
from torch import Tensor

import models
from models.backbones import RESNETS, FrameEncoderOptions, ImageNetResNet
from models.clip_fsar import ClipTowers
from models.frame_tower import FrameTower
from models.released import OUR_BACKBONE, OUR_RESNET, implied_options, misfits, our_names
from models.tiny_clip import CHANNELS
from utils.errors import UserError
from utils.schema import ModelOptions
from utils.weights import differences, raise_if_not_finite

USUAL_SIZE = 224
RESNET_STRIDE = 32
TINY_STRIDE = 2 ** len(CHANNELS)


def recognise_method(state: Mapping[str, Tensor], path: Path) -> str:
    """Returns the method of a released checkpoint, from the names of its entries.

    Raises:
        UserError: the entries do not belong to a known method, or are incomplete.
    """
    candidates = {name: models.method_class(name).released for name in models.available()}
    problems = {name: misfits(state, names) for name, names in candidates.items() if names.used}
    closest = min(problems, key=lambda name: len(problems[name]))
    if not any(our_names(name, candidates[method]) for name in state for method in problems):
        raise UserError(
            f"{path}: none of its entries ({len(state)}{_example(state)}) belongs to {', '.join(problems)}; convert a "
            "file that the released code of one of these methods saved"
        )
    if problems[closest]:
        raise UserError(
            f"{path}: its entries do not match any of {', '.join(problems)}; the closest is {closest}, where "
            f"{problems[closest][0]}"
        )
    return closest


def _example(state: Mapping[str, Tensor]) -> str:
    return f", for example {next(iter(state))}" if state else ""


def check_model(weights: Mapping[str, Tensor], method: str, path: Path) -> tuple[str, int]:
    """Checks that weights are complete for a model of the method, and finite.

    Args:
        weights: weights under the names of this project.
        method: name of the method.
        path: path of the file, used in messages.

    Returns:
        MODEL.BACKBONE, and DATA.IMG_SIZE in pixels.

    Raises:
        UserError: weights are missing, of a wrong shape, or not finite.
    """
    if views := [name for name, value in weights.items() if value.nbytes > value.untyped_storage().nbytes()]:
        raise UserError(f"{path}: {views[0]} has fewer numbers than its shape requires; copy the file again")
    names = models.method_class(method).released
    tower = below(OUR_BACKBONE if OUR_BACKBONE in names.backbone.values() else f"{OUR_RESNET}.", weights)
    if OUR_BACKBONE in names.backbone.values() or "ln_pre.weight" in tower:
        backbone, image_size = recognise_backbone(tower)
        options = {"BACKBONE": backbone, "CLIP_WEIGHTS": "random"}
    else:
        backbone, image_size = recognise_resnet(tower), USUAL_SIZE
        options = {"BACKBONE": backbone, "WEIGHTS": "random"}
    with torch.device("meta"):  # names and shapes only
        model = models.build(method, image_size, **options, **implied_options(weights, names))
    if found := differences(model.state_dict(), model.weights_to_test(weights)):
        raise UserError(
            f"{path}: the weights do not fit {method} with the backbone {backbone}, the closest one "
            f"({'; '.join(found)}); the file is incomplete, or was saved from a changed model"
        )
    raise_if_not_finite(weights, str(path), "copy the file again or use another one")
    return backbone, image_size


def recognise_backbone(tower: Mapping[str, Tensor]) -> tuple[str, int]:
    """Returns the backbone closest to an image tower by names and shapes, and the size of its frames.

    Args:
        tower: name without `clip.visual.` -> weight.

    Returns:
        MODEL.BACKBONE, which is tiny, tiny-vit or one of OpenAI's, and DATA.IMG_SIZE in pixels.
    """
    size = _image_size(tower)
    if "project.weight" in tower:
        return "tiny", size
    # A backbone whose name ends in quickgelu has the same weights with another activation.
    openai = [backbone for backbone in open_clip.list_openai_models() if not backbone.endswith("quickgelu")]
    names = [*openai, "tiny-vit"]
    return _closest(
        tower, names, lambda name: ClipTowers(ModelOptions(BACKBONE=name, CLIP_WEIGHTS="random"), size)
    ), size


def recognise_resnet(tower: Mapping[str, Tensor]) -> str:
    """Returns the MODEL.BACKBONE among torchvision's ResNets that is closest to the weights of a tower."""
    return _closest(tower, RESNETS, lambda name: ImageNetResNet(FrameEncoderOptions(BACKBONE=name, WEIGHTS="random")))


def below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights with names that begin with a prefix, without this prefix."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _closest(tower: Mapping[str, Tensor], names: Sequence[str], build: Callable[[str], FrameTower]) -> str:
    """Returns the backbone that differs from the tower in the fewest names and shapes."""
    entries = {(name, value.shape) for name, value in tower.items()}
    best, fewest = "", len(entries) + 10**6
    for name in names:
        with torch.device("meta"):
            state = build(name).visual.state_dict()
        differing = len(entries ^ {(entry, value.shape) for entry, value in state.items()})
        if differing < fewest:
            best, fewest = name, differing
        if not fewest:
            break
    return best


def _image_size(tower: Mapping[str, Tensor]) -> int:
    """Returns the height and width of the frames in pixels, from the entry with a row or column for each position."""
    if (linear := tower.get("project.weight")) is not None:
        return TINY_STRIDE * isqrt(linear.shape[-1] // CHANNELS[-1]) or USUAL_SIZE
    positions, stride = tower.get("attnpool.positional_embedding"), RESNET_STRIDE
    if positions is None and "conv1.weight" in tower:
        positions, stride = tower.get("positional_embedding"), tower["conv1.weight"].shape[-1]
    if positions is None or not positions.ndim:
        return USUAL_SIZE
    return stride * isqrt(max(0, positions.shape[0] - 1)) or USUAL_SIZE
