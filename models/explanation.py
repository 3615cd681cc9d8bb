"""Explanations of scores, as numbers that a report can draw; a method provides those that apply to it.

Shapes: B episodes, Q queries, N ways, T and S frames, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from models.matching import Matcher, cosine_distances, sequence_cost, video_distances


@dataclass(frozen=True)
class Measure:
    """Numbers about each query, drawn as one panel.

    values: float [B, Q, N, X], or [B, Q, 1, X] if they do not depend on the class.
    meaning: one sentence that explains the numbers.
    axis: what X counts: frames in order, the episode's N classes, or named parts.
    parts: X names for the axis `part`; equal names that follow each other are one group.
    """

    values: Tensor
    meaning: str
    axis: Literal["frame", "class", "part"]
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """The explanation of the scores of B episodes; each part may be empty.

    pairings: name -> float [B, Q, N, T, S], the weight of each pair of a query's frame and a class's frame in their
        distance; None if the comparison does not pair frames.
    features: name of a module -> float [B, Q, ..., D], the queries after it.
    measures: name -> further values that the method computes for each query.
    """

    pairings: dict[str, Tensor | None] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    measures: dict[str, Measure] = field(default_factory=dict)


def frame_pairing(
    query: Tensor, prototypes: Tensor, matcher: Matcher, smoothing: float, both_directions: bool
) -> Tensor | None:
    """Returns the weight of each pair of frames in the distance of a query to a class.

    It is the gradient d distance / d D(l, m): for OTAM the soft alignment path, for bi-mhm the nearest frames.

    Args:
        query: float [B, Q, T, D].
        prototypes: float [B, N, S, D].
        matcher, smoothing, both_directions: see `models.matching.sequence_distances`.

    Returns:
        float32 [B, Q, N, T, S], or None for the matcher `mean`, which does not compare frames.
    """
    if matcher == "mean":
        return None
    distances = video_distances(query, prototypes)
    return pair_weights(lambda chosen: sequence_cost(chosen, matcher, smoothing, both_directions), distances)


def pair_weights(cost: Callable[[Tensor], Tensor], distances: Tensor) -> Tensor:
    """Returns d cost / d distances, in the shape of `distances`; also works under `torch.no_grad`."""
    with torch.enable_grad():
        leaf = distances.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(cost(leaf).sum(), leaf)
    return gradient


def text_measure(features: Tensor, class_text: Tensor, name: str) -> Measure:
    """Returns the cosine of features [B, Q, D] and the class texts [B, N, D]; `name` is that of the features."""
    similarity = 1 - cosine_distances(features, class_text)
    return Measure(similarity.unsqueeze(2), f"Cosine of the {name} and the text of each class.", "class")


def motion_measure(between: Tensor) -> Measure:
    """Returns the length of the motion [B, Q, T-1, D] between the frames of each query."""
    lengths = between.norm(dim=-1).unsqueeze(2)
    return Measure(lengths, "Length of the motion between neighbouring frames.", "frame")
