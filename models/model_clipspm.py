"""CLIP-SPM: prompt-guided semantic prototype modulation (arXiv 2512.19036).

    frames -> CLIP image tower -> f [T, D]          class names -> CLIP text tower -> w [D]
      HSMR  the motion of the frames is used as a prompt; deep motion must agree with the refined prompt (loss only)
      SPM   support videos are refined with their class text, queries with a prompt generated for them
      PADM  at each frame position, class anchors attend to the support videos and a global anchor to the queries
    score = -( 0.5 OTAM(prototype, query) + OTAM(modulated prototype, modulated query) + OTAM(anchor, global anchor) )

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, D feature width.

Where the paper and the released code differ, the options name both. `configs/clipspm/*.yaml` are the clean preset,
`configs/clipspm/released/*.yaml` follow the released code.
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor

from models import register
from models.adapter_aim import AimChoice
from models.base import (
    Episode,
    EpisodeLabels,
    EpisodeOutput,
    ProtocolName,
    cross_entropy,
    texts_of_queries,
    videos_of,
)
from models.clip_method import ClipMethodOptions
from models.clip_prompts import (
    AnchorAttention,
    AnchorOptions,
    DistanceOptions,
    GateSizes,
    MotionOptions,
    MotionPrompt,
    PromptFusion,
    PromptGenerator,
    frames_of,
    prompt_distances,
    raise_if_no_distance,
)
from models.layers import ONE_HEAD, TransformerOptions, layer_rows, released_layer_names
from models.prompt_method import PromptMethod
from models.released import ReleasedNames
from utils.schema import Section

# The names of the weights in the released code.
RELEASED = ReleasedNames(
    used={
        "mo_alpha1": "HSMR.weight",
        "motion_conv1": "HSMR.smooth.0",
        "motion_conv2": "HSMR.smooth.1",
        "token_tr.mlp.net": "SPM.generator",
        "gate_text": "fusion.prompt_gate",
        "gate_vision": "fusion.frame_gate",
        **released_layer_names("context2", "fusion.temporal"),
        **released_layer_names("context1", "PADM.among_samples"),
    },
    unused=("scale",),
    fixed={"HSMR.LEARNABLE_WEIGHT": True, **ONE_HEAD},
    rows={"SPM.GENERATOR_HIDDEN": "SPM.generator.0.weight", **layer_rows("fusion.temporal")},
    ratios={
        "SPM.TEXT_HIDDEN": "fusion.prompt_gate.0.weight",
        "SPM.VISION_HIDDEN": "fusion.frame_gate.0.weight",
    },
)


class SpmOptions(Section):
    """Semantic prompt modulation and its gated fusion."""

    ENABLED: bool = Field(True, description="prompts from class text; off: frames refined without a prompt")
    ALPHA: float = Field(0.2, ge=0, description="factor on the gated prompt (the paper's fusion has 1)")
    TEXT_HIDDEN: float = Field(1.5, gt=0, description="hidden width of the prompt's gate, in units of D")
    VISION_HIDDEN: float = Field(0.5, gt=0, description="hidden width of the frames' gate, in units of D")
    NEGATIVE_SLOPE: float = Field(0.0025, ge=0, description="slope of the gates' LeakyReLU below zero")
    GENERATOR_HIDDEN: int = Field(2048, ge=1, description="hidden width of the prompt generator")
    GENERATOR_DROPOUT: float = Field(0.05, ge=0, lt=1, description="dropout in the prompt generator")
    TEXT_LOSS: bool = Field(True, description="generated prompts imitate the true text (off as released)")
    TEXT_QUERY_WEIGHT: float = Field(
        0.07, ge=0, le=0.5, description="weight of the queries' part; the supports' is 0.5 minus it"
    )
    CONSISTENCY_LOSS: bool = Field(True, description="refinements by true and generated prompt agree (off as released)")
    CONSISTENCY_QUERY_WEIGHT: float = Field(
        0.54, ge=0, le=1, description="weight of the queries' part; the supports' is 1 minus it"
    )


class ClipSpmOptions(ClipMethodOptions, AimChoice):
    """The `MODEL` section of CLIP-SPM."""

    HSMR: MotionOptions = MotionOptions()
    SPM: SpmOptions = SpmOptions()
    PADM: AnchorOptions = AnchorOptions()
    DISTANCES: DistanceOptions = DistanceOptions()
    TRANSFORMER: TransformerOptions = TransformerOptions()
    CROSS_ENTROPY_WEIGHT: float = Field(1.0, gt=0, description="weight of the cross-entropy, a mean over queries")
    AUXILIARY_WEIGHT: float = Field(0.001, ge=0, description="weight of all auxiliary losses together")

    @model_validator(mode="after")
    def _raise_if_no_distance(self) -> "ClipSpmOptions":
        raise_if_no_distance(self.DISTANCES, "PADM", self.PADM.ENABLED)
        return self


@register("clipspm")
class ClipSpm(PromptMethod):
    """CLIP-SPM with its three modules, each of which can be switched off."""

    Options = ClipSpmOptions
    MODULES = ("HSMR", "SPM", "PADM")
    released = RELEASED

    def __init__(self, options: ClipSpmOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        self.options = options
        width, spm = self.clip.width, options.SPM
        gates = GateSizes(spm.TEXT_HIDDEN, spm.VISION_HIDDEN, spm.NEGATIVE_SLOPE)
        has_prompts = spm.ENABLED or options.HSMR.ENABLED
        self.fusion = PromptFusion(width, options.TRANSFORMER, spm.ALPHA, gates if has_prompts else None)
        self.HSMR = MotionPrompt(width, options.HSMR) if options.HSMR.ENABLED else None
        self.SPM = PromptGenerator(width, spm.GENERATOR_HIDDEN, spm.GENERATOR_DROPOUT) if spm.ENABLED else None
        self.PADM = AnchorAttention(width, options.TRANSFORMER) if options.PADM.ENABLED else None

    def training_losses(self, episode: Episode, labels: EpisodeLabels, protocol: ProtocolName) -> EpisodeOutput:
        """Computes the cross-entropy and the auxiliary losses of HSMR and SPM.

        L = CROSS_ENTROPY_WEIGHT * CE + AUXILIARY_WEIGHT * (HSMR.WEIGHT * L_HSMR + L_text + L_consistency)

        Args:
            episode: features from `encode`, [B, N, K, T, D] and [B, Q, T, D].
            labels: of the B episodes; only the queries' labels are used.
            protocol: transductive lets PADM see all queries of an episode, inductive one at a time.

        Returns:
            scores float32 [B, Q, N] and the losses cross_entropy, motion, text and consistency.
        """
        support, query, class_text = episode
        videos, counts = videos_of(episode), [support.shape[1] * support.shape[2], query.shape[1]]
        text, generated = self.texts_of_supports(support, class_text), self.generated_prompts(videos, class_text)
        support_text = query_prompts = support_prompts = prompts = None
        if text is not None and generated is not None:
            support_text, (support_prompts, query_prompts) = text.flatten(1, 2), generated.split(counts, dim=1)
            prompts = torch.cat([support_text, query_prompts], dim=1)
        support_tokens, query_tokens = self.fusion(videos, prompts).split(counts, dim=1)
        refined_support = frames_of(support_tokens, support).unflatten(1, support.shape[1:3])
        scores = self.compare(refined_support, frames_of(query_tokens, query), protocol)
        losses = {"cross_entropy": self.options.CROSS_ENTROPY_WEIGHT * cross_entropy(scores, labels.query)}
        auxiliary = self.options.AUXILIARY_WEIGHT
        if self.HSMR:
            losses["motion"] = auxiliary * self.HSMR.weighted_loss(support, query, self.fusion)
        if self.SPM and (self.options.SPM.TEXT_LOSS or self.options.SPM.CONSISTENCY_LOSS):
            assert support_prompts is not None
            # With the other prompts: generated ones for supports, the true text for queries.
            query_text = texts_of_queries(class_text, labels.query)
            others = self.fusion(videos, torch.cat([support_prompts, query_text], dim=1))
            support_fake, query_true = others.split(counts, dim=1)
            of_support = prompt_distances(support_text, support_prompts, support_tokens, support_fake)
            of_query = prompt_distances(query_text, query_prompts, query_true, query_tokens)
            losses |= self._prompt_losses(of_query, of_support)
        return EpisodeOutput(scores, losses)

    def _prompt_losses(self, of_query: tuple[Tensor, Tensor], of_support: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Computes L_text and L_consistency from their query and support parts, if they are switched on."""
        options, auxiliary = self.options.SPM, self.options.AUXILIARY_WEIGHT
        losses = {}
        if options.TEXT_LOSS:
            share = options.TEXT_QUERY_WEIGHT
            losses["text"] = auxiliary * (share * of_query[0] + (0.5 - share) * of_support[0])
        if options.CONSISTENCY_LOSS:
            share = options.CONSISTENCY_QUERY_WEIGHT
            losses["consistency"] = auxiliary * (share * of_query[1] + (1 - share) * of_support[1])
        return losses
