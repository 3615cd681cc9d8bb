"""Evaluation: each video is encoded once, then the episodes are scored from the features.

`precompute_support` and `precompute_query` of a method also run once for each video.

Several processes share the work: each encodes some of the videos and receives the features of all, then scores its
share of the episodes and receives the scores of all.

Shapes: E episodes of which B are scored at a time, N ways, K shots, Q queries, V videos, T frames, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from episodes.dataset import ClipReader
from episodes.sampler import EpisodeSampler, EpisodeSpec
from episodes.splits import SplitIndex
from models.base import Episode, FewShotModel, ProtocolName
from run import stopping
from run.encoder import Encoder
from run.feature_cache import FeatureCache
from run.features import FeatureBank, encode_videos
from utils import distributed
from utils.errors import UserError
from utils.jobs import progress

MAX_EPISODES = 50  # scored per call
CACHED_BYTES = 4 * 1024**2  # size of the features in a call, so that intermediate results stay in the CPU's cache


@dataclass(frozen=True)
class Evaluation:
    """The results of E episodes under one protocol.

    scores: float32 [E, Q, N]; the answer is the class with the highest score.
    per_episode: float64 [E], share of correct answers.
    right: int64 [C], correctly classified queries of each class over all episodes.
    query_counts: int64 [C], all queries of each class.
    stored_in: type of the features in memory, "float32" or "bfloat16".
    """

    protocol: ProtocolName
    scores: np.ndarray
    per_episode: np.ndarray
    right: np.ndarray
    query_counts: np.ndarray
    stored_in: str


@torch.no_grad()
def evaluate(
    encoder: Encoder,
    sampler: EpisodeSampler,
    class_text: Tensor,
    episodes: int,
    protocols: Sequence[ProtocolName],
    reader: ClipReader,
    batch_episodes: int,
    cache: FeatureCache | None = None,
) -> dict[ProtocolName, Evaluation]:
    """Scores episodes 0 to E-1 of a sampler under one or more protocols.

    Args:
        encoder: holds the model, whose training mode is restored afterwards.
        sampler: draws the episodes.
        class_text: float [C, D], text features of the split's classes.
        episodes: E.
        protocols: the protocols; they share the features.
        reader: reads the clips.
        batch_episodes: B, episodes per call of the model's `match`; 0: see `fast_batch`.
        cache: stores the backbone's features of all videos of the split; only for frozen backbones.

    Returns:
        protocol -> results.

    Raises:
        UserError: a video is unreadable, or the scores are not finite.
    """
    model, index = encoder.model, sampler.index
    was_training = model.training
    model.eval()
    specs = [sampler.episode(i) for i in range(episodes)]
    support_videos = np.unique(np.stack([spec.support for spec in specs])).tolist()
    query_videos = np.unique(np.stack([spec.query for spec in specs])).tolist()
    used = np.union1d(support_videos, query_videos).tolist()
    encode = cache.encode_videos if cache else encode_videos
    bank = encode(encoder, index, used, reader)
    supports = precompute_supports(model, bank, index, support_videos, class_text)
    queries = precompute_queries(model, bank, query_videos, class_text.device)
    own = [specs[i] for i in distributed.share(range(episodes))]
    stopping.check()
    scores = score_episodes(model, own, supports, queries, class_text, protocols, batch_episodes)
    model.train(was_training)
    arrays = {protocol: _finite_arrays(scores[protocol]) for protocol in protocols}
    all_scores = {protocol: np.stack(distributed.gather_in_order(arrays[protocol])) for protocol in protocols}
    stored = stored_in(bank, supports, queries)
    return {p: _count(p, specs, all_scores[p], len(class_text), stored) for p in protocols}


@torch.no_grad()
def precompute_supports(
    model: FewShotModel, bank: FeatureBank, index: SplitIndex, videos: Sequence[int], class_text: Tensor
) -> FeatureBank:
    """Returns `precompute_support` of each video with the text of its class, as a bank of float [V, ...].

    For a method that precomputes nothing, this is the given bank.
    """

    def precompute(chosen: np.ndarray, features: Tensor) -> Tensor:
        text = class_text[torch.from_numpy(index.class_of_video[chosen]).to(class_text.device)]
        as_episodes = features[:, None, None]
        result = model.precompute_support(as_episodes, text[:, None])
        return features if result is as_episodes else result[:, 0, 0]

    return bank.map(precompute, videos, class_text.device)


@torch.no_grad()
def precompute_queries(
    model: FewShotModel, bank: FeatureBank, videos: Sequence[int], device: torch.device
) -> FeatureBank:
    """Returns `precompute_query` of each video, as a bank of float [V, ...].

    For a method that precomputes nothing, this is the given bank.
    """

    def precompute(chosen: np.ndarray, features: Tensor) -> Tensor:
        as_episodes = features[:, None]
        result = model.precompute_query(as_episodes)
        return features if result is as_episodes else result[:, 0]

    return bank.map(precompute, videos, device)


@torch.no_grad()
def score_episodes(
    model: FewShotModel,
    specs: Sequence[EpisodeSpec],
    supports: FeatureBank,
    queries: FeatureBank,
    class_text: Tensor,
    protocols: Sequence[ProtocolName],
    batch_episodes: int,
) -> dict[ProtocolName, list[Tensor]]:
    """Scores episodes from features, batch by batch; the host does not wait for the device.

    Args:
        model: in evaluation mode.
        specs: the E episodes.
        supports: contains every support video, from `precompute_supports`.
        queries: contains every query video, from `precompute_queries`.
        class_text, protocols, batch_episodes: see `evaluate`.

    Returns:
        protocol -> batches, float32 [B, Q, N] on the device of the texts.
    """
    scores: dict[ProtocolName, list[Tensor]] = {protocol: [] for protocol in protocols}
    if not specs:
        return scores
    support = supports.rows(np.stack([spec.support for spec in specs]))
    query = queries.rows(np.stack([spec.query for spec in specs]))
    class_ids = torch.from_numpy(np.stack([spec.class_ids for spec in specs])).to(class_text.device)
    size = batch_episodes or fast_batch(specs[0], supports, queries, class_text.device)
    batches = range(0, len(specs), size)
    for start in progress(batches, len(batches), "score", unit="batch"):
        part = slice(start, start + size)
        episode = Episode(
            support=supports.take(support[part]).to(class_text.device),
            query=queries.take(query[part]).to(class_text.device),
            class_text=class_text[class_ids[part]],
        )
        for protocol in protocols:
            scores[protocol].append(model.score_precomputed(*episode, protocol))
    return scores


def stored_in(*banks: FeatureBank) -> str:
    """Returns "bfloat16" if one of the banks holds rounded features, otherwise "float32"."""
    return "bfloat16" if "bfloat16" in {bank.stored_in for bank in banks} else "float32"


def fast_batch(spec: EpisodeSpec, supports: FeatureBank, queries: FeatureBank, device: torch.device) -> int:
    """Returns how many episodes to score per call: on a CPU as many as fit its cache, on a GPU the maximum.

    Args:
        spec: one of the episodes, which all have the same size.
        supports, queries: see `score_episodes`.
        device: computes the scores.
    """
    if device.type != "cpu":
        return MAX_EPISODES
    videos = ((spec.support.size, supports.features[0]), (spec.query.size, queries.features[0]))
    size = sum(count * video.numel() * video.element_size() for count, video in videos)
    return max(1, min(MAX_EPISODES, CACHED_BYTES // size))


def _finite_arrays(scores: Sequence[Tensor]) -> list[np.ndarray]:
    """Returns the scores of each episode, float32 [Q, N], from batches [B, Q, N]; raises UserError for NaN or inf."""
    if not all(batch.isfinite().all() for batch in scores):
        raise UserError("scores contain NaN or inf: the checkpoint or the weights are damaged, or training diverged")
    return [episode for batch in scores for episode in batch.float().cpu().numpy()]


def _count(
    protocol: ProtocolName, specs: Sequence[EpisodeSpec], scores: np.ndarray, classes: int, stored: str
) -> Evaluation:
    """Counts the correct answers from scores float32 [E, Q, N]."""
    labels = np.stack([spec.query_labels for spec in specs])
    true_classes = np.stack([spec.class_ids[spec.query_labels] for spec in specs])
    is_right = scores.argmax(axis=-1) == labels
    return Evaluation(
        protocol=protocol,
        scores=scores,
        per_episode=is_right.mean(axis=1),
        right=np.bincount(true_classes[is_right], minlength=classes),
        query_counts=np.bincount(true_classes.ravel(), minlength=classes),
        stored_in=stored,
    )
