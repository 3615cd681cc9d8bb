"""The CLIP of the demo, small enough to train from random weights on two CPU cores in minutes."""

import torch
from torch import Tensor, nn

from utils.errors import UserError

TINY_FEATURES = 128
CHANNELS = (16, 32, 64, 128)
TINY_MAP_FEATURES = CHANNELS[-1]  # channels of the last convolution
LAYERS_OF_A_BLOCK = 3  # convolution, batch norm, ReLU
TEXT = {"width": 64, "heads": 2, "layers": 1}
UNUSED_VISION = {"layers": 1, "width": 32, "head_width": 32, "patch_size": 32}  # replaced by TinyImageTower


def tiny_clip(image_size: int) -> nn.Module:
    """A small CLIP with random weights; the text tower is the same in every run, since it is never trained.

    Args:
        image_size: height and width of the frames in pixels, a multiple of 16.

    Raises:
        UserError: an image size that is not.
    """
    import open_clip  # imported late, as it takes seconds

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.CLIP(TINY_FEATURES, UNUSED_VISION, TEXT)
    clip.visual = TinyImageTower(image_size)
    return clip


class TinyImageTower(nn.Module):
    """Four convolutions of stride 2, then one linear layer over all positions, which keeps their place."""

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
        """float [V, 3, H, W] -> float [V, TINY_FEATURES]."""
        return self.project(self.convolutions(images).flatten(1))
