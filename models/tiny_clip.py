"""The CLIPs of the demo, small enough to train from random weights on two CPU cores in minutes.

`tiny` has a convolutional image tower; `tiny-vit` has CLIP's vision transformer, for methods that add layers to it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError

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
    """Builds a small CLIP with random weights; the text tower, which is never trained, is the same in every run.

    Args:
        name: one of TINY_BACKBONES.
        image_size: height and width of the frames in pixels, a multiple of 16, or of 8 for tiny-vit.
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
