"""TRAIN.CACHED_FEATURES: training episodes from the features of a frozen backbone.

Shapes: V videos, T frames, N ways, K shots, Q queries.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from episodes.dataset import ClipOptions, ClipReader
from episodes.sampler import EpisodeSampler, EpisodeSpec
from models.base import FewShotModel
from run.bank_memory import bank_memory
from run.data import RunData
from run.encoder import BackboneEncoder
from run.features import FeatureCache, encode_videos
from utils import distributed
from utils.errors import UserError
from utils.schema import Config

if TYPE_CHECKING:
    from run.run_directory import TrainingState


@dataclass(frozen=True)
class EpisodeFeatures:
    """One training episode.

    index: number of the episode.
    features: float32 [N*K + Q, ...], output of the backbone, support videos by class, then the queries.
    class_ids: int64 [N].
    query_labels: int64 [Q].
    bad_clips: always empty, since no video is replaced here.
    """

    index: int
    features: Tensor
    class_ids: Tensor
    query_labels: Tensor
    bad_clips: dict[str, str] = field(default_factory=dict)


class CachedEpisodes:
    """Training episodes from features that a frozen backbone computes before the first episode.

    Each video is represented by its test clip. The speed costs augmentation: no random frames, crops or mirroring.

    Attributes:
        bank: the features of the backbone.
    """

    def __init__(
        self,
        encoder: BackboneEncoder,
        sampler: EpisodeSampler,
        reader: ClipReader,
        all_episodes: range,
        episodes: range,
        cache: FeatureCache | None = None,
        stored_in: str | None = None,
    ) -> None:
        """Encodes the videos of `all_episodes`, so that a resumed run has the same features, bit for bit.

        Args:
            encoder: holds the model, whose backbone must be frozen.
            sampler: draws the episodes.
            reader: reads the clips.
            all_episodes: the episodes of the whole run.
            episodes: the episodes to iterate over.
            cache: stores the features of all videos of the split for other runs.
            stored_in: type of the features of a run that resumes, "float32" or "bfloat16"; None: see `bank_memory`.

        Raises:
            UserError: the method trains a part of `backbone_features`, or a video is unreadable.
        """
        self.sampler, self.episodes = sampler, episodes
        encoder.model.eval()
        _refuse_uncacheable(encoder.model, encoder.device, reader.options)
        if cache:
            self.bank = cache.bank(encoder, sampler.index, reader)
            return
        used = np.unique(
            np.concatenate([_videos(sampler.episode(i)) for i in all_episodes] or [np.zeros(0, dtype=np.int64)])
        )
        dtype = getattr(torch, stored_in) if stored_in else None
        allocate = partial(bank_memory, device=encoder.device, dtype=dtype)
        self.bank = encode_videos(encoder, sampler.index, used.tolist(), reader, allocate)

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self) -> Iterator[EpisodeFeatures]:
        for i in self.episodes:
            spec = self.sampler.episode(i)
            features = self.bank.take(self.bank.rows(_videos(spec)))
            yield EpisodeFeatures(i, features, torch.from_numpy(spec.class_ids), torch.from_numpy(spec.query_labels))


def cached_episodes(
    config: Config,
    model: FewShotModel,
    data: RunData,
    episodes: range,
    cache: FeatureCache | None,
    state: "TrainingState | None" = None,
) -> CachedEpisodes:
    """Returns this process's share of the training episodes of a run; a model in evaluation mode computes the features.

    Args:
        config, model, data: of the run.
        episodes: the episodes of all processes.
        cache: see `CachedEpisodes`.
        state: gives the type of the features of a run that resumes, and records it otherwise.
    """
    encoder = BackboneEncoder(model, next(model.parameters()).device, config.DATA.IMG_NORM, config.USE_AMP)
    whole_run = range(max(config.TRAIN.TRAIN_EPISODES, episodes.stop))
    own, stored_in = distributed.share(episodes), state.cached_in if state else None
    cached = CachedEpisodes(encoder, data.samplers["train"], data.reader(), whole_run, own, cache, stored_in)
    if state:
        state.cached_in = state.cached_in or cached.bank.stored_in
    return cached


def _videos(spec: EpisodeSpec) -> np.ndarray:
    """Returns the videos of an episode in the order of its features: int64 [N*K + Q]."""
    return np.concatenate([spec.support.ravel(), spec.query])


def _refuse_uncacheable(model: FewShotModel, device: torch.device, options: ClipOptions) -> None:
    """Raises UserError if a loss needs the frames, or a gradient would flow through `backbone_features`."""
    if model.needs_frames:
        raise UserError(
            f"TRAIN.CACHED_FEATURES: a loss of {type(model).__name__} needs the frames, which are not cached: "
            "set TRAIN.CACHED_FEATURES to false, or the weight of that loss to 0"
        )
    with torch.enable_grad():
        features = model.backbone_features(torch.zeros(1, options.length, 3, options.size, options.size, device=device))
    if features.requires_grad:
        raise UserError(
            f"TRAIN.CACHED_FEATURES: {type(model).__name__} has trainable layers in `backbone_features`, which cached "
            "features would leave untrained: set TRAIN.CACHED_FEATURES to false, or move them to `encode_features`"
        )
