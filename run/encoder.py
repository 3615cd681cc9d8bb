"""Turns clips into features: normalisation, backbone, autocast and device, for training and evaluation.

Shapes: V videos, T frames, F the method's own feature shape.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.base import FewShotModel
from videotransforms.video_transforms import normalise


class Encoder:
    """Turns clips into features with a model, on its device."""

    def __init__(self, model: FewShotModel, device: torch.device, normalise_pixels: bool, amp: bool) -> None:
        self.model, self.device, self.amp = model, device, amp
        # Copied to the device once, because a copy at each call would make the host wait.
        self.mean = torch.tensor(model.pixel_mean, device=device) if normalise_pixels else None
        self.std = torch.tensor(model.pixel_std, device=device) if normalise_pixels else None

    def __call__(self, clips: Tensor) -> Tensor:
        """Returns the features of videos, on the device: uint8 [V, T, 3, H, W] -> float32 [V, T, *F]."""
        return self.finish(self.backbone(clips))

    def backbone(self, clips: Tensor, chunk: int = 0) -> Tensor:
        """Returns the features of the backbone.

        Args:
            clips: uint8 [V, T, 3, H, W], or float32 from `frames`.
            chunk: number of videos per pass through the backbone; 0: all. The backward pass recomputes each chunk, so
                memory holds the intermediate results of only one chunk.

        Returns:
            float [V, ...] on the device.
        """
        clips = clips.to(self.device, non_blocking=True)
        if not chunk:
            return self._run_backbone(clips)
        parts = [checkpoint(self._run_backbone, part, use_reentrant=False) for part in clips.split(chunk)]
        return torch.cat(parts)

    def _run_backbone(self, clips: Tensor) -> Tensor:
        with self._autocast():
            return self.model.backbone_features(self.frames(clips) if clips.dtype == torch.uint8 else clips)

    def frames(self, clips: Tensor) -> Tensor:
        """Returns the normalised input of the backbone: uint8 [V, T, 3, H, W] on the device -> float32."""
        return normalise(clips, self.mean, self.std)

    def finish(self, features: Tensor) -> Tensor:
        """Applies the rest of the encoding to the output of `backbone`: float [V, ...] -> float32 [V, T, *F]."""
        with self._autocast():
            return self.model.encode_features(features).float()

    def finish_for_training(self, features: Tensor, frames: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the same as `finish`, and the losses of individual videos.

        Args:
            features: float [V, ...] of all videos of an episode, from `backbone`.
            frames: float32 [V, T, 3, H, W], from `frames`, for methods that need them.

        Returns:
            features float32 [V, T, *F]; losses, name -> scalar.
        """
        with self._autocast():
            encoded, losses = self.model.encode_for_training(features, frames)
        return encoded.float(), losses

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


class BackboneEncoder(Encoder):
    """An encoder that stops after the backbone, so that its features do not depend on later layers."""

    def __call__(self, clips: Tensor) -> Tensor:
        """Returns the output of the backbone: uint8 [V, T, 3, H, W] -> float32 [V, ...] on the device."""
        return self.backbone(clips).float()
