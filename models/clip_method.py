"""The base class of the methods on CLIP features, and the video-text loss L_vt.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, C classes, D feature width.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from models.adapter_aim import AimChoice
from models.base import (
    Episode,
    EpisodeLabels,
    FewShotModel,
    cross_entropy,
    training_class_of_videos,
    videos_of,
)
from models.matching import cosine_distances
from models.sentences import ClassSentences, TextOptions
from utils.schema import ModelOptions


class ClipMethodOptions(TextOptions):
    """The `MODEL` section of a method on CLIP features."""


class ClipMethod(FewShotModel):
    """Base class of the methods that begin with CLIP's feature of each frame and of each class text.

    Attributes:
        clip: the towers; `clip.width` is D.
        adapter: the adapter of MODEL.ADAPTER in the image tower, or None.
    """

    Options: ClassVar[type[ModelOptions]] = ClipMethodOptions

    def __init__(self, options: ClipMethodOptions, image_size: int) -> None:
        """See `ClipTowers`."""
        from models.clip_fsar import ClipTowers  # imported late, as open_clip takes seconds

        super().__init__()
        self.clip = ClipTowers(options, image_size)
        self.adapter = options.attach_adapter(self.clip, image_size) if isinstance(options, AimChoice) else None
        self.sentences = ClassSentences(options)
        self.pixel_mean, self.pixel_std = self.clip.pixel_mean, self.clip.pixel_std

    def encode(self, frames: Tensor) -> Tensor:
        """Returns CLIP's feature of each frame: float [V, T, 3, H, W] -> float [V, T, D]."""
        return self.clip(frames)

    def class_text(self, prompt_names: Sequence[str]) -> Tensor:
        """Averages the text features over the sentences of each class: float32 [C, D]."""
        return self.clip.class_text(self.sentences, prompt_names)

    def text_source(self, prompt_names: Sequence[str]) -> tuple[list[Tensor], dict[str, Any]]:
        """Returns everything that `class_text` depends on: the text tower's weights, sentences and options."""
        return self.clip.text_source(self.sentences, prompt_names)

    def cut_prompts(self, prompt_names: Sequence[str]) -> list[bool]:
        """Returns for each of C classes whether a sentence is longer than the text tower reads."""
        return self.clip.cut_prompts(self.sentences, prompt_names)

    def drop_text_tower(self) -> None:
        """Frees CLIP's text tower."""
        self.clip.drop_text_tower()


def video_text_logits(videos: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Computes scale * cos(mean_t f, w), in float32 for features of any type.

    Args:
        videos: float [B, V, T, D].
        text: float [C, D], the same for all episodes, or [B, N, D].
        scale: 1 / temperature, float32 [1].

    Returns:
        float32 [B, V, C] or [B, V, N].
    """
    return scale * (1 - cosine_distances(videos.float().mean(dim=2), text))


def video_text_loss(episode: Episode, labels: EpisodeLabels, scale: Tensor) -> Tensor:
    """Computes L_vt: the mean of -log p_vt(true class | v) over all videos and all training classes, a scalar.

    Args:
        episode: features from `encode`, [B, N, K, T, D] and [B, Q, T, D].
        labels: of the B episodes, and the texts of all training classes.
        scale: see `video_text_logits`.
    """
    logits = video_text_logits(videos_of(episode), labels.all_text, scale)
    return cross_entropy(logits, training_class_of_videos(episode, labels))
