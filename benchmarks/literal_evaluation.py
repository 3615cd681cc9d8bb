"""The literal side of the benchmarks: scores methods as their equations are written, one episode and class at a time.

Supports have labels, prototypes are computed in a loop over the unique labels, and OTAM's table is filled cell by cell.
The layers (attention, feed-forward, gates) are those of the model. A cell contains a value for each pair of a query
and a class, as in the released code.

`clipspm_loss` is the training loss of CLIP-SPM in the same style: six passes of the fusion, one after the other.

Shapes: S support videos, Q queries, N classes, T frames, D feature width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EPSILON = 0.01  # added to the product of the norms, as all published OTAM code does

# (model, support [S, T, D], labels int64 [S], query [Q, T, D], class_text [N, D]) -> [Q, N]
LiteralScores = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]


def frame_distances(query: Tensor, support: Tensor) -> Tensor:
    """Computes 1 - cosine of every frame of [Q, T, D] to every frame of [N, T, D]: [Q, N, T, T]."""
    queries, supports = query.flatten(0, 1), support.flatten(0, 1)
    norms = queries.norm(dim=-1, keepdim=True) * supports.norm(dim=-1)
    distances = 1 - queries @ supports.T / (norms + EPSILON)
    return distances.unflatten(1, support.shape[:2]).unflatten(0, query.shape[:2]).transpose(1, 2)


def fill_table(distances: Tensor, smoothing: float) -> Tensor:
    """Computes OTAM's recursion, one cell after the other: [Q, N, T, T] -> [Q, N]."""
    padded = torch.nn.functional.pad(distances, (1, 1))
    rows, columns = padded.shape[-2:]
    table = torch.zeros_like(padded)
    for column in range(1, columns):
        table[:, :, 0, column] = padded[:, :, 0, column] + table[:, :, 0, column - 1]
    for row in range(1, rows):
        for column in range(1, columns):
            before = [table[:, :, row - 1, column - 1], table[:, :, row, column - 1]]
            if column in (1, columns - 1):
                before.append(table[:, :, row - 1, column])
            softmin = -smoothing * torch.logsumexp(-torch.stack(before) / smoothing, dim=0)
            table[:, :, row, column] = padded[:, :, row, column] + softmin
    return table[:, :, -1, -1]


def otam_distances(query: Tensor, support: Tensor, smoothing: float) -> Tensor:
    """Adds the costs of both directions: [Q, T, D] and [N, T, D] -> [Q, N]."""
    distances = frame_distances(query, support)
    return fill_table(distances, smoothing) + fill_table(distances.transpose(2, 3), smoothing)


def means_by_class(videos: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean over the videos of each class: [S, ...] -> [N, ...]."""
    return torch.stack([videos[labels == label].mean(dim=0) for label in labels.unique()])


def otam(model: Any, support: Tensor, labels: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
    """Scores OTAM: distances to all support videos, averaged over those of a class."""
    distances = otam_distances(query, support, model.options.OTAM_LAMBDA)
    return -means_by_class(distances.T, labels).T


def clipfsar(model: Any, support: Tensor, labels: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
    """Scores CLIP-FSAR: supports modulated with their text, queries without text, one distance."""
    modulated = model.modulation(torch.cat([support, class_text[labels].unsqueeze(1)], dim=1))[:, :-1]
    return -otam_distances(model.modulation(query), means_by_class(modulated, labels), model.options.OTAM_LAMBDA)


def clipspm(model: Any, support: Tensor, labels: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
    """Scores CLIP-SPM: refinement of supports and queries, then `match_refined`."""
    support = model.fusion(support, class_text[labels])[:, 1:]
    prompts = model.SPM.generator(class_text.mean(dim=0) * query.mean(dim=(1, 2)).unsqueeze(1))
    return match_refined(model, support, labels, model.fusion(query, prompts)[:, 1:])


def match_refined(model: Any, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """Scores CLIP-SPM from refined frames [S, T, D] and [Q, T, D]: anchors and attention among the samples."""
    weights, anchors = model.options.DISTANCES, []
    for label in labels.unique():
        own = support[labels == label]
        anchors.append((own.sum(dim=0) + query.sum(dim=0)) / (len(own) + len(query)))
    global_anchor = torch.stack(anchors).mean(dim=0, keepdim=True)
    class_side = _among_samples(model, torch.cat([torch.stack(anchors), support]))
    query_side = _among_samples(model, torch.cat([global_anchor, query]))

    pairs = [
        (weights.PROTOTYPE, query, means_by_class(support, labels)),
        (weights.MODULATED, query_side[1:], means_by_class(class_side[len(anchors) :], labels)),
        (weights.ANCHOR, query_side[:1], class_side[: len(anchors)]),
    ]
    scores = torch.zeros(len(query), len(anchors))
    for weight, queries, prototypes in pairs:
        scores = scores - weight * otam_distances(queries, prototypes, weights.OTAM_LAMBDA)
    return scores


def _among_samples(model: Any, samples: Tensor) -> Tensor:
    """Applies attention over the samples at each frame position: [S, T, D] -> [S, T, D]."""
    return model.PADM.among_samples(samples.transpose(0, 1)).transpose(0, 1)


def clipspm_loss(
    model: Any, support: Tensor, labels: Tensor, query: Tensor, query_labels: Tensor, class_text: Tensor
) -> Tensor:
    """Computes the training loss of CLIP-SPM; labels int64 [S] and [Q], the other shapes as in `clipspm`."""
    fusion, spm, text, text_of_queries = model.fusion, model.options.SPM, class_text[labels], class_text[query_labels]
    motion = motion_loss(model, support) + motion_loss(model, query)
    token = torch.cat([text_of_queries, text]).mean(dim=0)
    prompts, query_prompts = (
        model.SPM.generator(token * videos.mean(dim=(1, 2)).unsqueeze(1)) for videos in (support, query)
    )
    true, fake = fusion(support, text), fusion(support, prompts)
    query_true, query_fake = fusion(query, text_of_queries), fusion(query, query_prompts)
    text_losses = [
        squared_distance(text, prompts) + squared_distance(true[:, 0], fake[:, 0]),
        squared_distance(text_of_queries, query_prompts) + squared_distance(query_true[:, 0], query_fake[:, 0]),
    ]
    share = spm.TEXT_QUERY_WEIGHT
    auxiliary = model.HSMR.weight * motion + (0.5 - share) * text_losses[0] + share * text_losses[1]
    share = spm.CONSISTENCY_QUERY_WEIGHT
    auxiliary += (1 - share) * squared_distance(true, fake) + share * squared_distance(query_true, query_fake)
    scores = match_refined(model, true[:, 1:], labels, query_fake[:, 1:])
    return torch.nn.functional.cross_entropy(scores, query_labels) + model.options.AUXILIARY_WEIGHT * auxiliary


def motion_loss(model: Any, videos: Tensor) -> Tensor:
    """Computes the distance of the deep motion of [V, T, D] to the refined motion prompt."""

    def motion(frames: Tensor) -> Tensor:
        smooth = model.HSMR.smooth(frames.mT).mT
        return (0.5 * (smooth[:, 1:] - frames[:, :-1] + smooth[:, :-1] - frames[:, 1:])).mean(dim=1)

    refined = model.fusion(videos, motion(videos))
    return squared_distance(motion(refined[:, 1:]), refined[:, 0])


def squared_distance(one: Tensor, other: Tensor) -> Tensor:
    """Returns the mean over the first axis of the squared distances."""
    return (one - other).square().flatten(1).sum(dim=1).mean()


METHODS: dict[str, LiteralScores] = {"clipspm": clipspm, "clipfsar": clipfsar, "otam": otam}


def each_query_alone(scores: LiteralScores) -> LiteralScores:
    """Scores with the inductive protocol of a method whose queries see each other: one episode for each query."""

    def alone(model: Any, support: Tensor, labels: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        return torch.cat([scores(model, support, labels, one, class_text) for one in query.split(1)])

    return alone
