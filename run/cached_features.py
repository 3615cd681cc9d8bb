"""Training episodes whose videos have passed a frozen backbone already (TRAIN.CACHED_FEATURES).

Each video stands for its test clip: no random frames, crops or mirroring, which is what the speed costs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from episodes.dataset import ClipOptions, ClipReader
from episodes.sampler import EpisodeSampler, EpisodeSpec
from models.base import FewShotModel
from run.encoder import BackboneEncoder
from run.evaluation import encode_videos, kept_or_encoded
from run.feature_cache import FeatureCache
from utils.errors import UserError


@dataclass(frozen=True)
class EpisodeFeatures:
    """One training episode.

    index: its number. features: float32 [N*K + Q, ...] as the backbone returns them, support videos by class, then
    the queries. class_ids: int64 [N]. query_labels: int64 [Q]. bad_clips: none, as none is replaced here.
    """

    index: int
    features: Tensor
    class_ids: Tensor
    query_labels: Tensor
    bad_clips: dict[str, str] = field(default_factory=dict)


class CachedEpisodes:
    """Some training episodes from the features of their videos, all of which are encoded at once."""

    def __init__(
        self,
        encoder: BackboneEncoder,
        sampler: EpisodeSampler,
        reader: ClipReader,
        all_episodes: range,
        episodes: range,
        cache: FeatureCache | None = None,
    ) -> None:
        """Encodes the videos of `all_episodes`, so that a run that goes on has the same features, bit for bit.

        Args:
            encoder: holds the model, whose backbone must be frozen.
            sampler: draws the episodes.
            reader: makes and reads the clips.
            all_episodes: those of the whole run.
            episodes: those to go through.
            cache: keeps the features of all videos of the split for other runs.

        Raises:
            UserError: the method trains something within `backbone_features`, or a video cannot be read.
        """
        self.sampler, self.episodes = sampler, episodes
        _refuse_trained_backbone(encoder.model, encoder.device, reader.options)
        encoder.model.eval()
        if cache:
            self.bank = kept_or_encoded(cache, encoder, sampler.index, reader)
            return
        used = np.unique(
            np.concatenate([_videos(sampler.episode(i)) for i in all_episodes] or [np.zeros(0, dtype=np.int64)])
        )
        self.bank = encode_videos(encoder, sampler.index, used.tolist(), reader)

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self) -> Iterator[EpisodeFeatures]:
        for i in self.episodes:
            spec = self.sampler.episode(i)
            features = self.bank.take(self.bank.rows(_videos(spec)))
            yield EpisodeFeatures(i, features, torch.from_numpy(spec.class_ids), torch.from_numpy(spec.query_labels))


def _videos(spec: EpisodeSpec) -> np.ndarray:
    """The videos of an episode in the order of its features: int64 [N*K + Q]."""
    return np.concatenate([spec.support.ravel(), spec.query])


def _refuse_trained_backbone(model: FewShotModel, device: torch.device, options: ClipOptions) -> None:
    """A gradient that would flow through `backbone_features` must not be cut off silently."""
    model.eval()
    with torch.enable_grad():
        features = model.backbone_features(torch.zeros(1, options.length, 3, options.size, options.size, device=device))
    if features.requires_grad:
        raise UserError(
            f"TRAIN.CACHED_FEATURES: {type(model).__name__} has trained layers in `encode`, which cached features "
            f"would leave untrained: set TRAIN.CACHED_FEATURES to false, or let its `backbone_features` end before them"
        )
