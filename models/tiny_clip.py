"""The CLIPs of the demo, small enough to train from random weights on two CPU cores in minutes.

`tiny` has a convolutional image tower; `tiny-vit` has CLIP's vision transformer, for methods that add layers to it.
Their trained weights are the `.safetensors` files beside this file, in half precision; `run/pretrain_demo.py` writes
them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import write_atomically

TINY_FEATURES = 128
CHANNELS = (16, 32, 64, 128)
TINY_MAP_FEATURES = CHANNELS[-1]  # channels of the last convolution
LAYERS_OF_A_BLOCK = 3  # convolution, batch norm, ReLU
TEXT = {"width": 64, "heads": 2, "layers": 1}
VIT = {"width": 64, "heads": 2, "layers": 3}
VIT_GRID = 8  # patches in a row
TINY_BACKBONES = ("tiny", "tiny-vit")
UNUSED_VISION = {"layers": 1, "width": 32, "head_width": 32, "patch_size": 32}  # replaced below


def tiny_clip(name: str, image_size: int, quick_gelu: bool) -> nn.Module:
    """Builds a small CLIP with random weights; those of the text tower, which methods never train, are always the same.

    Args:
        name: one of TINY_BACKBONES.
        image_size: height and width of the frames in pixels, a multiple of 16 for tiny and of 8 for tiny-vit.
        quick_gelu: activation of tiny-vit.

    Raises:
        UserError: the image size is not such a multiple.
    """
    import open_clip  # imported late, as it takes seconds

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.CLIP(TINY_FEATURES, UNUSED_VISION, TEXT)
    clip.visual = TinyImageTower(image_size) if name == "tiny" else _tiny_vit(image_size, quick_gelu)
    return clip


def _tiny_vit(image_size: int, quick_gelu: bool) -> nn.Module:
    """Returns open_clip's VisionTransformer of 8 x 8 patches with random weights."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    if image_size % VIT_GRID:
        raise UserError(f"DATA.IMG_SIZE: the backbone tiny-vit needs a multiple of {VIT_GRID}, found {image_size}")
    activation = QuickGELU if quick_gelu else nn.GELU
    visual = VisionTransformer(
        image_size, image_size // VIT_GRID, **VIT, mlp_ratio=4.0, output_dim=TINY_FEATURES, act_layer=activation
    )
    _sharpen(visual)
    return visual


@torch.no_grad()
def _sharpen(visual: Any) -> None:
    """Makes the random attention focus on single patches, and scales positions to the size of the contents.

    With open_clip's initialisation, attention is uniform: all frames get the same feature, and hundreds of episodes
    pass before the model learns anything.
    """
    visual.positional_embedding.mul_(8)
    for block in visual.transformer.resblocks:
        query_and_key = block.attn.in_proj_weight[: 2 * VIT["width"]]
        query_and_key.mul_(3)


class TinyImageTower(nn.Module):
    """Four convolutions of stride 2, then one linear layer over all positions, which preserves their location."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        shrinks = 2 ** len(CHANNELS)
        if image_size % shrinks:
            raise UserError(f"DATA.IMG_SIZE: the tiny backbone needs a multiple of {shrinks}, found {image_size}")
        layers: list[nn.Module] = []
        for narrow, wide in zip((3, *CHANNELS), CHANNELS, strict=False):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.project = nn.Linear(CHANNELS[-1] * (image_size // shrinks) ** 2, TINY_FEATURES)

    def forward(self, images: Tensor) -> Tensor:
        """Maps float [V, 3, H, W] -> float [V, TINY_FEATURES]."""
        return self.project(self.convolutions(images).flatten(1))


# --- trained weights: `MODEL.CLIP_WEIGHTS: demo` ----------------------------------------------------------

DEMO_WEIGHTS = {
    "tiny": Path(__file__).with_name("tiny_clip.safetensors"),
    "tiny-vit": Path(__file__).with_name("tiny_vit_clip.safetensors"),
}
DEMO_IMAGE_SIZE = 64  # pixels
# Most of the vocabulary does not occur in captions. A file contains only the rows of the tokens that training changed,
# and their ids; the other rows keep the random values of `tiny_clip`.
ALL_ROWS, ROWS, TOKENS = "token_embedding.weight", "token_embedding.rows", "token_embedding.tokens"


def demo_clip(backbone: str, image_size: int, path: Path | None = None) -> nn.Module:
    """Loads a small CLIP with its trained weights, or with those of another file of `save_demo_weights`.

    Raises:
        UserError: there are no trained weights for the backbone, or they were trained with another image size.
    """
    if backbone not in DEMO_WEIGHTS or image_size != DEMO_IMAGE_SIZE:
        raise UserError(
            f"MODEL.CLIP_WEIGHTS demo is for MODEL.BACKBONE {' or '.join(DEMO_WEIGHTS)} and DATA.IMG_SIZE "
            f"{DEMO_IMAGE_SIZE}, found {backbone} and {image_size}: change these, or set MODEL.CLIP_WEIGHTS to random"
        )
    clip = untrained_clip(backbone)
    weights = safetensors.torch.load_file(path or DEMO_WEIGHTS[backbone])
    table = clip.state_dict()[ALL_ROWS].clone()
    table[weights.pop(TOKENS).long()] = weights.pop(ROWS).to(table.dtype)
    clip.load_state_dict({**weights, ALL_ROWS: table})
    return clip


def untrained_clip(backbone: str) -> nn.Module:
    """Builds the towers before `run/pretrain_demo.py` trains them, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_clip(backbone, DEMO_IMAGE_SIZE, quick_gelu=False)


def save_demo_weights(clip: nn.Module, backbone: str, path: Path, note: Mapping[str, str]) -> None:
    """Writes weights for `demo_clip`.

    Args:
        clip: the trained towers.
        backbone: one of DEMO_WEIGHTS.
        path: the file.
        note: description of the training; `safetensors.safe_open(path).metadata()` reads it.
    """
    weights = {name: _halved(value.contiguous()) for name, value in clip.state_dict().items()}
    changed = (clip.state_dict()[ALL_ROWS] != untrained_clip(backbone).state_dict()[ALL_ROWS]).any(dim=1)
    weights[ROWS], weights[TOKENS] = weights.pop(ALL_ROWS)[changed], changed.nonzero().flatten().int()
    write_atomically(path, safetensors.torch.save(weights, dict(note)))


def _halved(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value
