"""Towers of every kind that is known, small enough for unit tests."""

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from models.frame_tower import FrameTower
from models.tiny_clip import TinyImageTower
from utils.schema import ModelOptions

IMAGE_SIZE = 32


class SmallTower(FrameTower):
    """A tower whose maps no test reads."""

    def image_maps(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _drop_pooling(self) -> int:
        raise NotImplementedError


def network(kind: str) -> nn.Module:
    """Builds a network with the same weights at every call."""
    torch.manual_seed(0)
    if kind == "ViT":
        return VisionTransformer(IMAGE_SIZE, 16, width=32, layers=4, heads=2, mlp_ratio=2.0, output_dim=8)
    if kind == "RN":
        resnet = ModifiedResNet([1, 1, 1, 1], output_dim=8, heads=4, image_size=IMAGE_SIZE, width=8)
        for name, parameter in resnet.named_parameters():
            if name.endswith("bn3.weight"):  # initialised with zeros, which would hide earlier layers
                nn.init.ones_(parameter)
        return resnet
    if kind == "resnet":
        return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=8)
    if kind == "tiny":
        return TinyImageTower(IMAGE_SIZE)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * IMAGE_SIZE**2, 8))


KINDS = ("ViT", "RN", "resnet", "tiny")


def tower(kind: str, **options: object) -> SmallTower:
    """Returns a tower of this kind in training mode."""
    return SmallTower(network(kind), ModelOptions(BACKBONE=kind, **options)).train()  # type: ignore[arg-type]


def frames(videos: int = 2) -> Tensor:
    """Returns float [V, 2, 3, H, W]."""
    return torch.rand(videos, 2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
