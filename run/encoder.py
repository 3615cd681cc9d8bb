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

    def __call__(self, clips: Tensor, chunk: int = 0) -> Tensor:
        """Features of videos, on the device.

        Args:
            clips: uint8 [V, T, 3, H, W].
            chunk: how many videos pass the backbone at a time; where gradients are wanted, each chunk passes it a
                second time in the backward pass, so that only one chunk's intermediate results are in memory. 0: all.

        Returns:
            float32 [V, T, *F].
        """
        if not chunk:
            return self.finish(self.backbone(clips))
        chunks = clips.to(self.device, non_blocking=True).split(chunk)
        return self.finish(torch.cat([checkpoint(self.backbone, part, use_reentrant=False) for part in chunks]))

    def backbone(self, clips: Tensor) -> Tensor:
        """The features of the backbone alone: uint8 [V, T, 3, H, W] -> float [V, ...] on the device."""
        frames = normalise(clips.to(self.device, non_blocking=True), self.mean, self.std)
        with self._autocast():
            return self.model.backbone_features(frames)

    def finish(self, features: Tensor) -> Tensor:
        """The rest of the encoding, from the features of `backbone`: float [V, ...] -> float32 [V, T, *F]."""
        with self._autocast():
            return self.model.encode_features(features).float()

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


class BackboneEncoder(Encoder):
    """An encoder that ends where the backbone ends, so that its features depend on no layer behind it."""

    def __call__(self, clips: Tensor, chunk: int = 0) -> Tensor:
        """uint8 [V, T, 3, H, W] -> float32 [V, ...] on the device."""
        return self.backbone(clips).float()
