"""What CLIP-SPM shows of its scores: pairings of frames, features behind its modules, gates, prompts and motion."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.explanation import Explanation, Measure, frame_pairing, motion_measure, text_measure
from models.layers import motion_between

if TYPE_CHECKING:
    from models.model_clipspm import ClipSpm


def explain(model: "ClipSpm", support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
    """Returns how scores came about; the arguments are those of `FewShotModel.explain`.

    The third distance pairs anchors and no frames of a query, so it has no pairing.
    """
    options, prompts = model.options.DISTANCES, model.generated_prompts(query, class_text)
    support = model.precompute_support(support, class_text)
    refined = model.refine(query, prompts)[..., -query.shape[2] :, :]
    compared = {"SPM": (refined, support.mean(dim=2))}
    if model.PADM:
        _, _, prototypes, modulated = model.PADM(support, refined)
        compared["PADM"] = modulated, prototypes
    smoothing, both_directions = options.OTAM_LAMBDA, options.OTAM_BOTH_DIRECTIONS
    measures = {}
    if prompts is not None:
        measures = {
            "gates": gate_measure(model, query, prompts),
            "generated prompt and class texts": text_measure(prompts, class_text, "prompt generated for the query"),
        }
    if model.HSMR:
        measures["motion"] = motion_measure(motion_between(query, model.HSMR.smooth))
    return Explanation(
        {name: frame_pairing(*pair, "otam", smoothing, both_directions) for name, pair in compared.items()},
        {name: videos for name, (videos, _) in compared.items()},
        measures,
    )


def gate_measure(model: "ClipSpm", query: Tensor, prompts: Tensor) -> Measure:
    """Returns how far the gates open for queries [B, Q, T, D] with prompts [B, Q, D]."""
    fusion, frames = model.fusion, query.shape[2]
    opened = torch.cat([fusion.prompt_gate(prompts.unsqueeze(2)), fusion.frame_gate(query)], dim=2).mean(dim=-1)
    return Measure(
        opened.unsqueeze(2),
        "How far the gates open for the generated prompt and for each frame, mean over the features.",
        "part",
        ("prompt", *(f"frame {t + 1}" for t in range(frames))),
    )
