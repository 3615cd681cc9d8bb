"""The base class of CLIP-MEI and its successor CLIP-SPM: refines with prompts, modulates with anchors, compares.

    support videos -> fusion with their class text -> refined [T, D]
    query          -> prompt generated from the class texts of the episode -> fusion -> refined [T, D]
    score = -( w1 D1 + w2 D2 + w3 D3 ), see `models.clip_prompts.anchored_scores`

Shapes: B episodes, N ways, K shots, Q queries, T frames, D feature width.
"""

from typing import Any, ClassVar

from einops import repeat
from torch import Tensor

from models.base import ProtocolName
from models.clip_method import ClipMethod
from models.clip_prompts import AnchorAttention, DistanceOptions, MotionPrompt, PromptFusion, anchored_scores, frames_of
from models.explanation import Explanation, Measure, frame_pairing, motion_measure, text_measure
from models.layers import motion_between


class PromptMethod(ClipMethod):
    """Base class of CLIP-MEI and CLIP-SPM; their files define the modules under the names of the papers.

    Attributes:
        MODULES: names of the motion module, the prompt generator and the anchors; a module is None if switched off.
        fusion: refines frames with prompts.
    """

    MODULES: ClassVar[tuple[str, str, str]]
    transductive = True
    fusion: PromptFusion
    options: Any

    def generated_prompts(self, videos: Tensor, class_text: Tensor) -> Tensor | None:
        """Generates prompts without labels: [B, ..., T, D] and [B, N, D] -> [B, ..., D]; None if switched off."""
        generator = getattr(self, self.MODULES[1])
        return generator(videos, class_text) if generator else None

    def texts_of_supports(self, support: Tensor, class_text: Tensor) -> Tensor | None:
        """Returns the true prompts, [B, N, K, T, D] and [B, N, D] -> [B, N, K, D]; None without a prompt generator."""
        has_prompts = getattr(self, self.MODULES[1]) is not None
        return repeat(class_text, "b n d -> b n k d", k=support.shape[2]) if has_prompts else None

    def precompute_support(self, support: Tensor, class_text: Tensor) -> Tensor:
        """Refines support videos with their true class text: float [B, N, K, T, D] -> the same shape."""
        return frames_of(self.fusion(support, self.texts_of_supports(support, class_text)), support)

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Scores the queries, refined with their generated prompts.

        Args:
            support: float [B, N, K, T, D], from `precompute_support`.
            query: float [B, Q, T, D].
            class_text: float [B, N, D].

        Returns:
            float32 [B, Q, N].
        """
        return self.compare(support, self._refined(query, class_text), "transductive")

    def match_alone(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Scores each query as the only one of its episode; shapes as in `match`."""
        return self.compare(support, self._refined(query, class_text), "inductive")

    def compare(self, support: Tensor, query: Tensor, protocol: ProtocolName) -> Tensor:
        """Scores refined videos; shapes as in `match`."""
        groups = query.unsqueeze(1) if protocol == "transductive" else query.unsqueeze(2)
        return anchored_scores(support, groups, getattr(self, self.MODULES[2]), self.options.DISTANCES)

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """Returns pairings, features after each module, generated prompts and the motion of each query."""
        motion, anchors = getattr(self, self.MODULES[0]), getattr(self, self.MODULES[2])
        support, refined = self.precompute_support(support, class_text), self._refined(query, class_text)
        explanation = explain_distances(support, refined, self.MODULES[1:], anchors, self.options.DISTANCES)
        prompts = self.generated_prompts(query, class_text)
        explanation.measures.update(prompt_measures(query, prompts, class_text, self.fusion, motion))
        return explanation

    def _refined(self, query: Tensor, class_text: Tensor) -> Tensor:
        """Refines queries with generated prompts: float [B, Q, T, D] -> the same shape."""
        return frames_of(self.fusion(query, self.generated_prompts(query, class_text)), query)


# --- explanations -------------------------------------------------------------------------------------------


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
    """Returns gates, generated prompts and motion of queries [B, Q, T, D], without those that are switched off."""
    measures = {}
    if prompts is not None and fusion.gated:
        measures["gates"] = gate_measure(fusion, query, prompts)
    if prompts is not None:
        name = "prompt generated for the query"
        measures["generated prompt and class texts"] = text_measure(prompts, class_text, name)
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
