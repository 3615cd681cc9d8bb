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
from torch.utils.data import DataLoader

from episodes.dataset import ClipOptions, EpisodeClips
from episodes.sampler import EpisodeSpec
from models.base import FewShotModel
from run.data import RunData
from run.encoder import BackboneEncoder
from run.feature_cache import FeatureCache
from run.features import bank_memory, encode_videos
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
    """This process's share of training episodes, from features that are computed before the first episode.

    Each video is represented by its test clip, so there is no augmentation: no random frames, crops or mirroring.

    Attributes:
        bank: the features of the backbone.
    """

    def __init__(
        self,
        config: Config,
        model: FewShotModel,
        data: RunData,
        episodes: range,
        cache: FeatureCache | None = None,
        state: "TrainingState | None" = None,
    ) -> None:
        """Encodes the videos of the whole run, so that a resumed run has the same features, bit for bit.

        Args:
            config, data: of the run.
            model: its backbone must be frozen; this sets it to evaluation mode.
            episodes: the episodes of all processes.
            cache: stores the features of all videos of the split for other runs.
            state: gives the type of the features of a run that resumes, and records it otherwise.

        Raises:
            UserError: the method trains a part of `backbone_features`, or a video is unreadable.
        """
        self.sampler, self.episodes = data.samplers["train"], distributed.share(episodes)
        model.eval()
        encoder = BackboneEncoder(model, next(model.parameters()).device, config.DATA.IMG_NORM, config.USE_AMP)
        _refuse_uncacheable(model, encoder.device, data.clip_options)
        dtype = getattr(torch, state.cached_in) if state and state.cached_in else None
        if cache and dtype != torch.bfloat16:  # stored features are float32
            self.bank = cache.bank(encoder, self.sampler.index, data.reader())
        else:
            whole_run = range(max(config.TRAIN.TRAIN_EPISODES, episodes.stop))
            used = {int(video) for i in whole_run for video in _videos(self.sampler.episode(i))}
            allocate = partial(bank_memory, device=encoder.device, dtype=dtype)
            self.bank = encode_videos(encoder, self.sampler.index, sorted(used), data.reader(), allocate)
        if state:
            state.cached_in = state.cached_in or self.bank.stored_in

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self) -> Iterator[EpisodeFeatures]:
        for i in self.episodes:
            spec = self.sampler.episode(i)
            features = self.bank.take(self.bank.rows(_videos(spec)))
            yield EpisodeFeatures(i, features, torch.from_numpy(spec.class_ids), torch.from_numpy(spec.query_labels))


TrainingEpisode = EpisodeClips | EpisodeFeatures
TrainingEpisodes = DataLoader[EpisodeClips] | CachedEpisodes


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
