"""From clips to features: normalisation, backbone, autocast and device in one place, for training and evaluation.

Shapes: V videos, T frames, F the method's own feature shape.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.base import FewShotModel
from videotransforms.video_transforms import normalise


class Encoder:
    """Frames to features: normalisation, autocast and device in one place."""

    def __init__(self, model: FewShotModel, device: torch.device, normalise_pixels: bool, amp: bool) -> None:
        self.model, self.device, self.amp = model, device, amp
        # Moved to the device once, since a copy at each call would make the host wait for it.
        self.mean = torch.tensor(model.pixel_mean, device=device) if normalise_pixels else None
        self.std = torch.tensor(model.pixel_std, device=device) if normalise_pixels else None

    def __call__(self, clips: Tensor) -> Tensor:
        """Features of videos, on the device: uint8 [V, T, 3, H, W] -> float32 [V, T, *F]."""
        return self.finish(self.backbone(clips))

    def backbone(self, clips: Tensor, chunk: int = 0) -> Tensor:
        """The features of the backbone alone.

        Args:
            clips: uint8 [V, T, 3, H, W], or what `frames` returned for them.
            chunk: how many videos pass the backbone at a time; where gradients are wanted, each chunk passes it a
                second time in the backward pass, so that only one chunk's intermediate results are in memory. 0: all.

        Returns:
            float [V, ...] on the device.
        """
        clips = clips.to(self.device, non_blocking=True)
        if not chunk:
            return self._of_backbone(clips)
        parts = [checkpoint(self._of_backbone, part, use_reentrant=False) for part in clips.split(chunk)]
        return torch.cat(parts)

    def _of_backbone(self, clips: Tensor) -> Tensor:
        with self._autocast():
            return self.model.backbone_features(self.frames(clips) if clips.dtype == torch.uint8 else clips)

    def frames(self, clips: Tensor) -> Tensor:
        """The normalised frames that the backbone takes: uint8 [V, T, 3, H, W] on the device -> float32."""
        return normalise(clips, self.mean, self.std)

    def finish(self, features: Tensor) -> Tensor:
        """The rest of the encoding, from the features of `backbone`: float [V, ...] -> float32 [V, T, *F]."""
        with self._autocast():
            return self.model.encode_features(features).float()

    def finish_for_training(self, features: Tensor, frames: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `finish`, with the losses of single videos.

        Args:
            features: float [V, ...] of all videos of an episode, from `backbone`.
            frames: float32 [V, T, 3, H, W], from `frames`, for methods that need them.
        """
        with self._autocast():
            encoded, losses = self.model.encode_for_training(features, frames)
        return encoded.float(), losses

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


class BackboneEncoder(Encoder):
    """An encoder that ends where the backbone ends, so that its features depend on no layer behind it."""

    def __call__(self, clips: Tensor) -> Tensor:
        """uint8 [V, T, 3, H, W] -> float32 [V, ...] on the device."""
        return self.backbone(clips).float()
