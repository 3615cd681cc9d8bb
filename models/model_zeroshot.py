"""CLIP's zero-shot classifier (Radford et al., ICML 2021), the row that a few-shot method has to beat.

    frames -> CLIP image tower -> f [T, D]          class names -> CLIP text tower -> w [D]
    score = cos(mean over the frames of f, w)

No support video is looked at and nothing is trained: set `TRAIN.TRAIN_EPISODES: 0`.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, D feature width.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from models import register
from models.base import FewShotModel
from models.clip_fsar import ClipTowers
from models.text import TemplateSet
from utils.schema import ModelOptions


class ZeroShotOptions(ModelOptions):
    """The `MODEL` section of zero-shot CLIP."""

    TEXT_TEMPLATES: TemplateSet = Field("actionclip16", description="sentences that a class text is the mean of")


@register("zeroshot")
class ZeroShot(FewShotModel):
    """CLIP as it was loaded: no parameter is trained, no statistic is updated."""

    Options = ZeroShotOptions

    def __init__(self, options: ZeroShotOptions, image_size: int) -> None:
        super().__init__()
        self.options = options
        self.clip = ClipTowers(options, image_size).requires_grad_(False)
        self.pixel_mean, self.pixel_std = self.clip.pixel_mean, self.clip.pixel_std
        self.eval()

    def train(self, mode: bool = True) -> "ZeroShot":
        """Stays in evaluation mode, so that batch norms and dropout are those of a test, whatever FREEZE_BN says."""
        super().train(False)
        return self

    def encode(self, frames: Tensor) -> Tensor:
        """CLIP's feature of each frame: float [V, T, 3, H, W] -> float [V, T, D]."""
        return self.clip(frames)

    def class_text(self, prompt_names: Sequence[str]) -> Tensor:
        """Mean over the templates: float32 [C, D]."""
        return self.clip.class_text(prompt_names, self.options.TEXT_TEMPLATES)

    def drop_text_tower(self) -> None:
        """Frees CLIP's text tower."""
        self.clip.drop_text_tower()

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Cosine similarity of each query's mean frame with each class text.

        Args:
            support: float [B, N, K, T, D], not used.
            query: float [B, Q, T, D].
            class_text: float [B, N, D].

        Returns:
            float32 [B, Q, N], in [-1, 1].
        """
        videos = query.float().mean(dim=2)
        return F.cosine_similarity(videos.unsqueeze(2), class_text.float().unsqueeze(1), dim=-1)
