"""Explains scores of CLIP-MEI and CLIP-SPM: pairings of frames, features, generated prompts, motion, gates."""

from torch import Tensor

from models.clip_prompts import AnchorAttention, DistanceOptions, MotionPrompt, PromptFusion
from models.explanation import Explanation, Measure, frame_pairing, motion_measure, text_measure
from models.layers import motion_between


def explain_distances(
    support: Tensor,
    query: Tensor,
    modules: tuple[str, str],
    anchors: AnchorAttention | None,
    options: DistanceOptions,
) -> Explanation:
    """Returns the pairings of frames behind D1 and D2, and the queries in them.

    The third distance compares anchors, not frames of a query, so it has no pairing.

    Args:
        support, query: refined frames, [B, N, K, T, D] and [B, Q, T, D].
        modules: names of the module that refines the frames and of the anchors.
        anchors, options: see `models.clip_prompts.anchored_scores`.
    """
    compared = {modules[0]: (query, support.mean(dim=2))}
    if anchors:
        _, _, prototypes, modulated = (part.squeeze(1) for part in anchors(support, query.unsqueeze(1)))
        compared[modules[1]] = modulated, prototypes
    smoothing, both_directions = options.OTAM_LAMBDA, options.OTAM_BOTH_DIRECTIONS
    return Explanation(
        {name: frame_pairing(*pair, "otam", smoothing, both_directions) for name, pair in compared.items()},
        {name: videos for name, (videos, _) in compared.items()},
    )


def prompt_measures(
    query: Tensor, prompts: Tensor | None, class_text: Tensor, fusion: PromptFusion, motion: MotionPrompt | None
) -> dict[str, Measure]:
    """Returns the gates, generated prompts and motion of queries [B, Q, T, D] that the method has."""
    measures = {}
    if prompts is not None and fusion.gated:
        measures["gates"] = gate_measure(fusion, query, prompts)
    if prompts is not None:
        what = "prompt generated for the query"
        measures["generated prompt and class texts"] = text_measure(prompts, class_text, what)
    if motion:
        measures["motion"] = motion_measure(motion_between(query, motion.smooth))
    return measures


def gate_measure(fusion: PromptFusion, query: Tensor, prompts: Tensor) -> Measure:
    """Returns the values of the gates for queries [B, Q, T, D] with prompts [B, Q, D]."""
    opened = fusion.gates(query, prompts).mean(dim=-1)
    return Measure(
        opened.unsqueeze(2),
        "How far the gates open for the generated prompt and for each frame, mean over the features.",
        "part",
        ("prompt", *(f"frame {t + 1}" for t in range(query.shape[2]))),
    )
