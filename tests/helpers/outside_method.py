"""A method from outside the package."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.base import FewShotModel
from utils.schema import ModelOptions


class OutsideOptions(ModelOptions):
    """The options of a method that is not in this package."""

    SHARPNESS: float = 2.0


class OutsideMethod(FewShotModel):
    """The smallest possible method: pixels are features, and the mean squared difference is the distance."""

    Options = OutsideOptions

    def __init__(self, options: OutsideOptions, image_size: int) -> None:
        super().__init__()
        self.options, self.image_size = options, image_size

    def encode(self, frames: Tensor) -> Tensor:
        return frames.flatten(2)

    def class_text(self, prompt_names: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompt_names), 1)

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        prototypes = support.mean(dim=(2, 3)).unsqueeze(1)
        return -self.options.SHARPNESS * (query.mean(dim=2).unsqueeze(2) - prototypes).square().mean(dim=-1)


OUTSIDE = f"{__name__}:OutsideMethod"
