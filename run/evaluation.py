"""Scoring episodes: every video is encoded once, then the episodes are scored from the features.

What a method precomputes of a support video and its class text (`precompute_support`), and of a query video
(`precompute_query`), is computed once for each video too.

Several processes share both: each encodes some of the videos and gets the features of all, then scores its share of
the episodes and gets the answers of all.

Shapes: E episodes of which B are scored at a time, N ways, K shots, Q queries, V videos, T frames, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from episodes.dataset import ClipReader
from episodes.sampler import EpisodeSampler, EpisodeSpec
from episodes.splits import SplitIndex
from models.base import Episode, FewShotModel, ProtocolName
from run import stopping
from run.encoder import BackboneEncoder, Encoder
from run.features import FeatureBank, FeatureCache, encode_videos, rows_of
from utils import distributed
from utils.errors import UserError
from utils.jobs import progress

VIDEOS_PER_PRECOMPUTATION = 128


@dataclass(frozen=True)
class Evaluation:
    """The outcome of E episodes under one protocol.

    scores: float32 [E, Q, N]; the answer is the class with the highest score. per_episode: float64 [E], share of right
    answers. right, asked: int64 [C], queries of each class over all episodes that were answered rightly, and all.
    """

    protocol: ProtocolName
    scores: np.ndarray
    per_episode: np.ndarray
    right: np.ndarray
    asked: np.ndarray


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
    """Scores episodes 0 .. episodes-1 of a sampler under one or more protocols.

    Args:
        encoder: holds the model, which is put into evaluation mode and back.
        sampler: draws the episodes.
        class_text: float [C, D], text features of the split's classes.
        episodes: E.
        protocols: which protocols to score; the features are shared.
        reader: makes and reads the clips.
        batch_episodes: B, episodes per call of the model's `match`.
        cache: keeps the backbone's features of all videos of the split; only for backbones that are not trained.

    Raises:
        UserError: a video cannot be read.
    """
    model, index = encoder.model, sampler.index
    was_training = model.training
    model.eval()
    specs = [sampler.episode(i) for i in range(episodes)]
    support_videos = np.unique(np.stack([spec.support for spec in specs])).tolist()
    query_videos = np.unique(np.stack([spec.query for spec in specs])).tolist()
    used = np.union1d(support_videos, query_videos).tolist()
    if cache:
        backbone = BackboneEncoder(model, encoder.device, encoder.mean is not None, encoder.amp)
        bank = cache.bank(backbone, index, reader)
        bank = _precomputed(lambda _, features: encoder.finish(features), bank, used, encoder.device)
    else:
        bank = encode_videos(encoder, index, used, reader)
    supports = precompute_supports(model, bank, index, support_videos, class_text)
    queries = precompute_queries(model, bank, query_videos, class_text.device)
    own = [specs[i] for i in distributed.share(range(episodes))]
    stopping.check()
    scores = score_episodes(model, own, supports, queries, class_text, protocols, batch_episodes)
    model.train(was_training)
    arrays = {protocol: _finite_arrays(scores[protocol]) for protocol in protocols}
    of_all = {protocol: np.stack(distributed.gather_in_order(arrays[protocol])) for protocol in protocols}
    return {p: _count(p, specs, of_all[p], len(class_text)) for p in protocols}


@torch.no_grad()
def precompute_supports(
    model: FewShotModel, bank: FeatureBank, index: SplitIndex, videos: Sequence[int], class_text: Tensor
) -> FeatureBank:
    """Returns the bank of `precompute_support` of each of the videos with the text of its class, float [V, ...].

    The bank itself for a method that precomputes nothing.
    """

    def precompute(chosen: np.ndarray, features: Tensor) -> Tensor:
        text = class_text[torch.from_numpy(index.class_of_video[chosen]).to(class_text.device)]
        as_episodes = features[:, None, None]
        result = model.precompute_support(as_episodes, text[:, None])
        return features if result is as_episodes else result[:, 0, 0]

    return _precomputed(precompute, bank, videos, class_text.device)


@torch.no_grad()
def precompute_queries(
    model: FewShotModel, bank: FeatureBank, videos: Sequence[int], device: torch.device
) -> FeatureBank:
    """Returns the bank of `precompute_query` of each of the videos, float [V, ...].

    The bank itself for a method that precomputes nothing.
    """

    def precompute(chosen: np.ndarray, features: Tensor) -> Tensor:
        as_episodes = features[:, None]
        result = model.precompute_query(as_episodes)
        return features if result is as_episodes else result[:, 0]

    return _precomputed(precompute, bank, videos, device)


def _precomputed(
    precompute: Callable[[np.ndarray, Tensor], Tensor], bank: FeatureBank, videos: Sequence[int], device: torch.device
) -> FeatureBank:
    """A bank of what `precompute` returns for videos int64 [V] and their features [V, T, *F], some at a time."""
    precomputed, row = torch.empty(0), 0
    for start in range(0, len(videos), VIDEOS_PER_PRECOMPUTATION):
        chosen = np.asarray(videos[start : start + VIDEOS_PER_PRECOMPUTATION])
        features = bank.take(bank.rows(chosen)).to(device)
        result = precompute(chosen, features)
        if result is features:
            return bank
        if not row:
            precomputed = torch.empty(len(videos), *result.shape[1:], device=device)
        precomputed[row : row + len(result)] = result
        row += len(result)
    return FeatureBank(precomputed, rows_of(videos, len(bank.row_of_video)))


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
    """Scores of episodes from features alone, batch by batch; the host waits for no device that holds the banks.

    Args:
        model: in evaluation mode.
        specs: the E episodes.
        supports: see `precompute_supports`; holds every support video.
        queries: see `precompute_queries`; holds every query video.
        class_text, protocols, batch_episodes: see `evaluate`.

    Returns:
        for each protocol the batches, float32 [B, Q, N] on the device of the texts.
    """
    scores: dict[ProtocolName, list[Tensor]] = {protocol: [] for protocol in protocols}
    if not specs:
        return scores
    support = supports.rows(np.stack([spec.support for spec in specs]))
    query = queries.rows(np.stack([spec.query for spec in specs]))
    class_ids = torch.from_numpy(np.stack([spec.class_ids for spec in specs])).to(class_text.device)
    batches = range(0, len(specs), batch_episodes)
    for start in progress(batches, len(batches), "score", unit="batch"):
        part = slice(start, start + batch_episodes)
        episode = Episode(
            support=supports.take(support[part]).to(class_text.device),
            query=queries.take(query[part]).to(class_text.device),
            class_text=class_text[class_ids[part]],
        )
        for protocol in protocols:
            scores[protocol].append(model.score_precomputed(*episode, protocol))
    return scores


def _finite_arrays(scores: Sequence[Tensor]) -> list[np.ndarray]:
    """The scores of each episode: batches float [B, Q, N] -> float32 [Q, N] each. Raises UserError if not finite."""
    if not all(batch.isfinite().all() for batch in scores):
        raise UserError("the scores are not finite, so they are no answer; the checkpoint or the weights are damaged")
    return [episode for batch in scores for episode in batch.float().cpu().numpy()]


def _count(protocol: ProtocolName, specs: Sequence[EpisodeSpec], scores: np.ndarray, classes: int) -> Evaluation:
    """Compares the answers, the highest of scores float32 [E, Q, N], with the labels."""
    labels = np.stack([spec.query_labels for spec in specs])
    true_classes = np.stack([spec.class_ids[spec.query_labels] for spec in specs])
    is_right = scores.argmax(axis=-1) == labels
    return Evaluation(
        protocol=protocol,
        scores=scores,
        per_episode=is_right.mean(axis=1),
        right=np.bincount(true_classes[is_right], minlength=classes),
        asked=np.bincount(true_classes.ravel(), minlength=classes),
    )
