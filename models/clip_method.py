"""What the methods on CLIP features share: the towers, one feature per frame, one text feature per class."""

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from models.base import FewShotModel
from models.clip_fsar import ClipTowers
from models.text import TemplateSet
from utils.schema import ModelOptions


class ClipMethodOptions(ModelOptions):
    """The `MODEL` section of a method on CLIP features."""

    TEXT_TEMPLATES: TemplateSet = Field("actionclip16", description="sentences that a class text is the mean of")


class ClipMethod(FewShotModel):
    """A method that begins with CLIP's feature of each frame and CLIP's text of each class.

    Attributes:
        clip: the towers; `clip.width` is D.
    """

    def __init__(self, options: ClipMethodOptions, image_size: int) -> None:
        """See `ClipTowers`."""
        super().__init__()
        self.clip = ClipTowers(options, image_size)
        self.templates = options.TEXT_TEMPLATES
        self.pixel_mean, self.pixel_std = self.clip.pixel_mean, self.clip.pixel_std

    def encode(self, frames: Tensor) -> Tensor:
        """CLIP's feature of each frame: float [V, T, 3, H, W] -> float [V, T, D]."""
        return self.clip(frames)

    def class_text(self, prompt_names: Sequence[str]) -> Tensor:
        """Mean over the templates: float32 [C, D]."""
        return self.clip.class_text(prompt_names, self.templates)

    def drop_text_tower(self) -> None:
        """Frees CLIP's text tower."""
        self.clip.drop_text_tower()
