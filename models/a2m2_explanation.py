"""Explains A2M2-Net's scores: the pairing of time windows, and the weights of scales and candidates."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.explanation import Explanation, Measure, pair_weights

if TYPE_CHECKING:
    from models.model_a2m2 import A2m2


def explain(model: "A2m2", support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
    """Explains the scores; the arguments are those of `FewShotModel.explain`.

    The weight of a pair of candidates is spread evenly over all pairs of windows that they cover.
    """
    pairs = model.pairs(support, query)
    windows = max(_windows(candidates[0, 0]) for candidates, _, _ in pairs)
    pairings, scale_costs, weights, names, parts = [], [], [], [], []
    for candidates, prototypes, cost in pairs:
        plan = _plan(model, candidates, prototypes, cost, class_text)
        times = _covered_times(candidates[0, 0], windows)
        pairings.append(torch.einsum("bqncs,ct,su->bqntu", plan, times, times))
        scale_costs.append((plan * cost).sum(dim=(-2, -1)))
        count = candidates.shape[2]
        names.append(f"{_windows(candidates[0, 0])}x{count // _windows(candidates[0, 0])}")
        parts += [names[-1]] * count
        if model.A2:
            weights.append(model.A2.log_weights(candidates, prototypes, class_text)[0].exp() * count)
    share = torch.stack(scale_costs, dim=-1)
    share = share / share.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    meaning = "Share of each scale (windows of time x regions) in the distance."
    measures = {"scales": Measure(share, meaning, "part", tuple(names))}
    if weights:
        meaning = "Weight of each candidate of the query; 1 if all candidates of its scale weigh the same."
        measures["candidates"] = Measure(torch.cat(weights, dim=-1), meaning, "part", tuple(parts))
    moments = torch.cat([candidates for candidates, _, _ in pairs], dim=2)[..., -model.M2.descriptor_width :]
    return Explanation({"candidates by time": torch.stack(pairings).sum(dim=0)}, {"moments": moments}, measures)


def _plan(model: "A2m2", query: Tensor, prototypes: Tensor, cost: Tensor, class_text: Tensor) -> Tensor:
    """Returns the weight of each pair of candidates in the distance at one scale: float [B, Q, N, C, C]."""
    if model.A2 and model.options.METRIC == "optimal-transport":
        return model.A2.plan(query, prototypes, cost, class_text)
    return pair_weights(lambda chosen: model.distances(query, prototypes, chosen, class_text), cost)


def _windows(candidates: Tensor) -> int:
    """Returns the number of time windows of one scale, from its candidates [C, 1 + BOUNDS + M]."""
    return len(candidates[:, 1:3].unique(dim=0))


def _covered_times(candidates: Tensor, windows: int) -> Tensor:
    """Returns the spread of each candidate over the finest time windows: [C, 1 + BOUNDS + M] -> [C, windows]."""
    middles = (torch.arange(windows, device=candidates.device) + 0.5) / windows
    covered = ((candidates[:, 1:2] <= middles) & (middles <= candidates[:, 2:3])).float()
    return covered / covered.sum(dim=-1, keepdim=True)
