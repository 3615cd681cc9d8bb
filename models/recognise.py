"""Which CLIP backbone the weights of an image tower belong to."""

from collections.abc import Mapping
from math import isqrt

import open_clip
import torch
from torch import Tensor

from models.clip_fsar import ClipTowers
from models.tiny_clip import CHANNELS
from utils.schema import ModelOptions

USUAL_SIZE = 224
RESNET_STRIDE = 32
TINY_STRIDE = 2 ** len(CHANNELS)


def recognise_backbone(tower: Mapping[str, Tensor]) -> tuple[str, int]:
    """Returns the backbone whose names and shapes are the closest to those of an image tower, and the size of frames.

    Args:
        tower: names below `clip.visual.` -> weights.

    Returns:
        MODEL.BACKBONE, which is tiny or one of OpenAI's, and DATA.IMG_SIZE in pixels.
    """
    size = _image_size(tower)
    if "project.weight" in tower:
        return "tiny", size
    found = {(name, value.shape) for name, value in tower.items()}
    best, fewest = "", len(found) + 10**6
    for backbone in open_clip.list_openai_models():
        if backbone.endswith("quickgelu"):  # the same weights under another activation
            continue
        with torch.device("meta"):
            clip = ClipTowers(ModelOptions(BACKBONE=backbone, CLIP_WEIGHTS="random"), size)
        differing = len(found ^ {(name, value.shape) for name, value in clip.visual.state_dict().items()})
        if differing < fewest:
            best, fewest = backbone, differing
        if not fewest:
            break
    return best, size


def _image_size(tower: Mapping[str, Tensor]) -> int:
    """Height and width of the frames in pixels, by the entry that has a part for each position."""
    if (linear := tower.get("project.weight")) is not None:
        return TINY_STRIDE * isqrt(linear.shape[-1] // CHANNELS[-1]) or USUAL_SIZE
    positions, stride = tower.get("attnpool.positional_embedding"), RESNET_STRIDE
    if positions is None and "conv1.weight" in tower:
        positions, stride = tower.get("positional_embedding"), tower["conv1.weight"].shape[-1]
    if positions is None or not positions.ndim:
        return USUAL_SIZE
    return stride * isqrt(max(0, positions.shape[0] - 1)) or USUAL_SIZE
