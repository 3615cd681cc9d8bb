"""Scoring episodes: every video is encoded once, then the episodes are scored from the features.

Several processes share both: each encodes some of the videos and gets the features of all, then scores its share of
the episodes and gets the answers of all.

Shapes: E episodes of which B are scored at a time, N ways, K shots, Q queries, V videos, T frames, C classes.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from episodes.dataset import ClipOptions, VideoDataset, video_loader
from episodes.sampler import EpisodeSampler, EpisodeSpec
from episodes.splits import SplitIndex
from models.base import Episode, FewShotModel, Protocol
from run import stopping
from utils import distributed
from utils.errors import UserError
from utils.utils import progress
from videotransforms.video_transforms import normalise

FRAMES_PER_BATCH = 512


@dataclass(frozen=True)
class Evaluation:
    """The outcome of E episodes under one protocol.

    per_episode: float64 [E], share of right answers. right, asked: int64 [C], queries of each class over all
    episodes that were answered rightly, and all of them.
    """

    protocol: Protocol
    per_episode: np.ndarray
    right: np.ndarray
    asked: np.ndarray


@dataclass(frozen=True)
class FeatureBank:
    """Features of some videos of a split: row_of_video[v] is the row of video v in features [V, T, *F]."""

    features: Tensor
    row_of_video: dict[int, int]

    def rows(self, videos: np.ndarray) -> Tensor:
        """int64 tensor of the shape of `videos`, on the features' device."""
        rows = np.vectorize(self.row_of_video.__getitem__, otypes=[np.int64])(videos)
        return torch.from_numpy(rows).to(self.features.device)


class Encoder:
    """Frames to features: normalisation, autocast and device in one place."""

    def __init__(self, model: FewShotModel, device: torch.device, normalise_pixels: bool, amp: bool) -> None:
        self.model, self.device, self.amp = model, device, amp
        # On the device once for all, since a copy at each call would make the host wait for it.
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
        """What the backbone alone says: uint8 [V, T, 3, H, W] -> float [V, ...] on the device."""
        frames = normalise(clips.to(self.device, non_blocking=True), self.mean, self.std)
        with self._autocast():
            return self.model.backbone_features(frames)

    def finish(self, features: Tensor) -> Tensor:
        """The rest of the encoding: what `backbone` returned -> float32 [V, T, *F]."""
        with self._autocast():
            return self.model.encode_features(features).float()

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


@torch.no_grad()
def encode_videos(
    encoder: Encoder, index: SplitIndex, videos: Sequence[int], options: ClipOptions, workers: int
) -> FeatureBank:
    """Encodes the test clip of each of the videos once; the model must be in evaluation mode.

    Raises:
        UserError: a video cannot be read.
    """
    batch_size = max(1, FRAMES_PER_BATCH // options.length)
    loader = video_loader(VideoDataset(index, options, _own_videos(videos)), batch_size, workers, encoder.device)
    batches = progress(loader, len(loader), f"encode {index.split}", unit="batch")
    own = []
    for clips in batches:  # as many on each process
        stopping.check()
        own.append(encoder(clips))
    features = distributed.gather_rows(torch.cat(own))
    return FeatureBank(features[: len(videos)], {int(video): row for row, video in enumerate(videos)})


def _own_videos(videos: Sequence[int]) -> list[int]:
    """Every R-th video, as many for each process: at the end some take one from the beginning, a second time."""
    processes = distributed.world_size()
    each = math.ceil(len(videos) / processes)
    return [videos[i % len(videos)] for i in range(distributed.rank(), each * processes, processes)]


@torch.no_grad()
def evaluate(
    encoder: Encoder,
    sampler: EpisodeSampler,
    class_text: Tensor,
    episodes: int,
    protocols: Sequence[Protocol],
    options: ClipOptions,
    workers: int,
    batch_episodes: int,
) -> dict[Protocol, Evaluation]:
    """Scores episodes 0 .. episodes-1 of a sampler under one or more protocols.

    Args:
        encoder: holds the model, which is put into evaluation mode and back.
        sampler: draws the episodes.
        class_text: float [C, D], text features of the split's classes.
        episodes: E.
        protocols: which protocols to score; the features are shared.
        options: how a clip is made.
        workers: processes that read videos.
        batch_episodes: B, episodes per call of the model's `match`.

    Raises:
        UserError: a video cannot be read.
    """
    model = encoder.model
    was_training = model.training
    model.eval()
    specs = [sampler.episode(i) for i in range(episodes)]
    used = np.unique(np.concatenate([np.concatenate([s.support.ravel(), s.query]) for s in specs]))
    bank = encode_videos(encoder, sampler.index, used.tolist(), options, workers)
    own = [specs[i] for i in distributed.share(range(episodes))]
    most = math.ceil(episodes / distributed.world_size())  # as many batches on each process, the last may be empty
    batches = [own[i : i + batch_episodes] for i in range(0, most, batch_episodes)]
    answers: dict[Protocol, list[np.ndarray]] = {protocol: [] for protocol in protocols}
    for batch in progress(batches, len(batches), f"score {sampler.index.split}", unit="batch"):
        stopping.check()
        if not batch:
            continue
        episode = _features_of(batch, bank, class_text)
        for protocol in protocols:
            answers[protocol].extend(_answers(model.score(episode, protocol)))
    model.train(was_training)
    everyones = {protocol: np.stack(distributed.gather_in_order(answers[protocol])) for protocol in protocols}
    return {p: _count(p, specs, everyones[p], len(class_text)) for p in protocols}


def _answers(scores: Tensor) -> np.ndarray:
    """The class of the highest score of each query: float [B, Q, N] -> int64 [B, Q]."""
    if not scores.isfinite().all():
        raise UserError("the scores are not finite, so they are no answer; the checkpoint or the weights are damaged")
    return scores.argmax(dim=-1).cpu().numpy()


def _features_of(batch: Sequence[EpisodeSpec], bank: FeatureBank, class_text: Tensor) -> Episode:
    """The features and class texts of B episodes; their labels stay behind."""
    class_ids = torch.from_numpy(np.stack([spec.class_ids for spec in batch])).to(class_text.device)
    return Episode(
        support=bank.features[bank.rows(np.stack([spec.support for spec in batch]))],
        query=bank.features[bank.rows(np.stack([spec.query for spec in batch]))],
        class_text=class_text[class_ids],
    )


def _count(protocol: Protocol, specs: Sequence[EpisodeSpec], answers: np.ndarray, classes: int) -> Evaluation:
    """Compares the answers, int64 [E, Q], with the labels."""
    labels = np.stack([spec.query_labels for spec in specs])
    true_classes = np.stack([spec.class_ids[spec.query_labels] for spec in specs])
    is_right = answers == labels
    return Evaluation(
        protocol=protocol,
        per_episode=is_right.mean(axis=1),
        right=np.bincount(true_classes[is_right], minlength=classes),
        asked=np.bincount(true_classes.ravel(), minlength=classes),
    )
