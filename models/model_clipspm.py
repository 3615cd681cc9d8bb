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

from typing import Literal

import torch
from einops import rearrange, reduce, repeat
from pydantic import Field, model_validator
from torch import Tensor, nn

from models import clipspm_explanation, register
from models.base import (
    Episode,
    EpisodeLabels,
    EpisodeOutput,
    ProtocolName,
    cross_entropy,
    match_under,
    texts_of_queries,
)
from models.clip_method import ClipMethod, ClipMethodOptions
from models.explanation import Explanation
from models.layers import (
    ONE_HEAD,
    TransformerLayer,
    TransformerOptions,
    feed_forward,
    gate,
    layer_rows,
    motion_between,
    released_layer_names,
)
from models.matching import otam, squared_distance, video_distances
from models.released import ReleasedNames
from utils.schema import Section

# The names of the weights in the published code.
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


class HsmrOptions(Section):
    """Hierarchical synergistic motion refinement."""

    ENABLED: bool = Field(True, description="add the motion consistency loss")
    WEIGHT: float = Field(1.0, ge=0, description="weight of the motion loss among the auxiliary losses")
    LEARNABLE_WEIGHT: bool = Field(False, description="released code: a parameter that starts at WEIGHT")
    POOL: Literal["mean", "sum"] = Field("mean", description="mean of half the motions (code) or sum (paper)")


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
    TEXT_QUERY_WEIGHT: float = Field(0.07, ge=0, le=0.5, description="queries' part of 0.5, supports have the rest")
    CONSISTENCY_LOSS: bool = Field(True, description="refinements by true and generated prompt agree (off as released)")
    CONSISTENCY_QUERY_WEIGHT: float = Field(0.54, ge=0, le=1, description="queries' part of 1, supports have the rest")


class PadmOptions(Section):
    """Prototype-anchor dual modulation."""

    ENABLED: bool = Field(True, description="add the two anchor-modulated distances")


class DistanceOptions(Section):
    """The three OTAM distances behind a score."""

    PROTOTYPE: float = Field(0.5, ge=0, description="weight of D1: prototypes and queries from SPM")
    MODULATED: float = Field(1.0, ge=0, description="weight of D2: prototypes and queries after PADM")
    ANCHOR: float = Field(1.0, ge=0, description="weight of D3: class anchors and global anchor, a class bias")
    OTAM_LAMBDA: float = Field(0.5, gt=0, description="smoothing of OTAM's softmin")
    OTAM_BOTH_DIRECTIONS: bool = Field(True, description="add the alignment with the roles exchanged")


class ClipSpmOptions(ClipMethodOptions):
    """The `MODEL` section of CLIP-SPM."""

    HSMR: HsmrOptions = HsmrOptions()
    SPM: SpmOptions = SpmOptions()
    PADM: PadmOptions = PadmOptions()
    DISTANCES: DistanceOptions = DistanceOptions()
    TRANSFORMER: TransformerOptions = TransformerOptions()
    CROSS_ENTROPY_WEIGHT: float = Field(1.0, gt=0, description="weight of the mean over queries")
    AUXILIARY_WEIGHT: float = Field(0.001, ge=0, description="weight of all auxiliary losses together")

    @model_validator(mode="after")
    def _refuse_no_distance(self) -> "ClipSpmOptions":
        weights = self.DISTANCES
        if weights.PROTOTYPE or (self.PADM.ENABLED and (weights.MODULATED or weights.ANCHOR)):
            return self
        raise ValueError(
            f"MODEL.DISTANCES.PROTOTYPE is 0 and no other distance is left to score with, as MODEL.PADM.ENABLED is "
            f"{str(self.PADM.ENABLED).lower()}, MODEL.DISTANCES.MODULATED {weights.MODULATED:g} and "
            f"MODEL.DISTANCES.ANCHOR {weights.ANCHOR:g}: set MODEL.DISTANCES.PROTOTYPE above 0, or one of the other "
            "two together with MODEL.PADM.ENABLED=true."
        )


class PromptFusion(nn.Module):
    """SF, the gated semantic fusion: a prompt is added to the frames, then both pass one transformer layer.

    x' = alpha * p * G_p(p) + x * G_v(x);  [p^; x^] = Transformer([p; x'])        with gates G = sigmoid(MLP)

    Motion prompts and text prompts share it. Without a prompt the frames pass the transformer layer alone.
    """

    def __init__(self, width: int, options: "ClipSpmOptions") -> None:
        super().__init__()
        self.temporal = TransformerLayer(width, options.TRANSFORMER)
        if options.SPM.ENABLED or options.HSMR.ENABLED:
            slope = options.SPM.NEGATIVE_SLOPE
            self.alpha = options.SPM.ALPHA
            self.prompt_gate = gate(width, options.SPM.TEXT_HIDDEN, slope)
            self.frame_gate = gate(width, options.SPM.VISION_HIDDEN, slope)

    def forward(self, prompt: Tensor | None, frames: Tensor) -> Tensor:
        """Refined tokens [V, 1+T, D], the prompt first, from a prompt [V, D] and frames [V, T, D].

        Without a prompt: refined frames [V, T, D].
        """
        if prompt is None:
            return self.temporal(frames)
        prompt = prompt.unsqueeze(1)
        fused = self.alpha * prompt * self.prompt_gate(prompt) + frames * self.frame_gate(frames)
        return self.temporal(torch.cat([prompt, fused], dim=1))  # the prompt itself enters ungated


class HSMR(nn.Module):
    """Motion as a prompt, and the loss that pulls deep motion and the refined prompt together."""

    def __init__(self, width: int, options: HsmrOptions) -> None:
        super().__init__()
        self.pool = options.POOL
        # No activation between the two: the released motion extraction is affine.
        self.smooth = nn.Sequential(
            nn.Conv1d(width, width, kernel_size=3, padding=1),
            nn.Conv1d(width, width, kernel_size=3, padding=1),
        )
        weight = torch.tensor(float(options.WEIGHT))
        self.weight = nn.Parameter(weight) if options.LEARNABLE_WEIGHT else weight.item()

    def motion(self, frames: Tensor) -> Tensor:
        """Both temporal differences between smoothed and plain neighbours, pooled: [V, T, D] -> [V, D]."""
        both = motion_between(frames, self.smooth)
        total = both.sum(dim=1)
        # A single frame has no neighbours; its motion is zero, not 0 / 0.
        return total if self.pool == "sum" else total / (2 * max(1, both.shape[1]))

    def loss(self, frames: Tensor, fusion: PromptFusion) -> Tensor:
        """d(motion of the refined frames, refined motion prompt), not yet weighted: [V, T, D] -> scalar."""
        refined = fusion(self.motion(frames), frames)
        return squared_distance(self.motion(refined[:, 1:]), refined[:, 0], dims=1)


class SPM(nn.Module):
    """Prompts for videos of unknown class, generated from the class texts of the episode."""

    def __init__(self, width: int, options: SpmOptions) -> None:
        super().__init__()
        self.generator = feed_forward(width, options.GENERATOR_HIDDEN, options.GENERATOR_DROPOUT)

    def generate(self, frames: Tensor, class_text: Tensor) -> Tensor:
        """p_gen = MLP(tau * r): tau the mean of the N class texts, r the mean of all activations of the video.

        The texts are those of the support set. The released code adds the true class texts of the queries to the
        mean, which changes nothing while every class has the same number of queries.

        Args:
            frames: float [B, V, T, D].
            class_text: float [B, N, D].

        Returns:
            float [B, V, D].
        """
        token = reduce(class_text, "b n d -> b 1 d", "mean")
        response = reduce(frames, "b v t d -> b v 1", "mean")
        return self.generator(token * response)


class PADM(nn.Module):
    """Anchors shared by support and queries, and attention among the samples of an episode, frame by frame.

    All queries enter each class anchor and attend to each other: this module makes CLIP-SPM transductive.
    """

    def __init__(self, width: int, options: TransformerOptions) -> None:
        super().__init__()
        self.among_samples = TransformerLayer(width, options)

    def forward(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Modulates an episode.

        Args:
            support: float [B, N, K, T, D].
            query: float [B, Q, T, D].

        Returns:
            class anchors [B, N, T, D], global anchor [B, 1, T, D], prototypes [B, N, T, D], queries [B, Q, T, D].
        """
        ways, shots, queries = support.shape[1], support.shape[2], query.shape[1]
        all_queries = query.sum(dim=1, keepdim=True)
        class_anchors = (support.sum(dim=2) + all_queries) / (shots + queries)
        global_anchor = class_anchors.mean(dim=1, keepdim=True)
        flat_support = rearrange(support, "b n k t d -> b (n k) t d")
        class_side = self._attend(torch.cat([class_anchors, flat_support], dim=1))
        query_side = self._attend(torch.cat([global_anchor, query], dim=1))
        prototypes = reduce(class_side[:, ways:], "b (n k) t d -> b n t d", "mean", n=ways)
        return class_side[:, :ways], query_side[:, :1], prototypes, query_side[:, 1:]

    def _attend(self, samples: Tensor) -> Tensor:
        """Attention over the S samples, separately at each frame position: [B, S, T, D] -> [B, S, T, D]."""
        per_frame = self.among_samples(rearrange(samples, "b s t d -> (b t) s d"))
        return rearrange(per_frame, "(b t) s d -> b s t d", b=samples.shape[0])


@register("clipspm")
class ClipSpm(ClipMethod):
    """CLIP-SPM with its three modules, each of which can be switched off."""

    Options = ClipSpmOptions
    transductive = True
    released = RELEASED

    def __init__(self, options: ClipSpmOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        self.options = options
        width = self.clip.width
        self.fusion = PromptFusion(width, options)
        self.HSMR = HSMR(width, options.HSMR) if options.HSMR.ENABLED else None
        self.SPM = SPM(width, options.SPM) if options.SPM.ENABLED else None
        self.PADM = PADM(width, options.TRANSFORMER) if options.PADM.ENABLED else None

    def precompute_support(self, support: Tensor, class_text: Tensor) -> Tensor:
        """Support videos refined with their true class text (SPM): [B, N, K, T, D] -> the same shape."""
        return _frames(self.refine(support, self._true_prompts(support, class_text)), support)

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Scores of the queries, refined with the prompts generated for them.

        Args:
            support: float [B, N, K, T, D], from `precompute_support`.
            query: float [B, Q, T, D].
            class_text: float [B, N, D].

        Returns:
            float32 [B, Q, N].
        """
        tokens = self.refine(query, self.generated_prompts(query, class_text))
        return self._compare(support, _frames(tokens, query), class_text)

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """The pairings and features behind SPM and PADM, and what the modules compute of each query."""
        return clipspm_explanation.explain(self, support, query, class_text)

    def training_losses(self, episode: Episode, labels: EpisodeLabels, protocol: ProtocolName) -> EpisodeOutput:
        """Cross-entropy plus the auxiliary losses of HSMR and SPM.

        L = CROSS_ENTROPY_WEIGHT * CE + AUXILIARY_WEIGHT * (HSMR.WEIGHT * L_HSMR + L_text + L_consistency)

        Args:
            episode: features from `encode`, [B, N, K, T, D] and [B, Q, T, D].
            labels: of the B episodes; only the queries' labels are used.
            protocol: transductive lets PADM see all queries of an episode, inductive one at a time.

        Returns:
            scores float32 [B, Q, N] and the losses cross_entropy, motion, text and consistency.
        """
        support, query, class_text = episode.support, episode.query, episode.class_text
        support_text = self._true_prompts(support, class_text)
        support_tokens = self.refine(support, support_text)
        query_prompts = self.generated_prompts(query, class_text)
        query_tokens = self.refine(query, query_prompts)

        refined = Episode(_frames(support_tokens, support), _frames(query_tokens, query), class_text)
        scores = match_under(protocol, self._compare, *refined)
        losses = {"cross_entropy": self.options.CROSS_ENTROPY_WEIGHT * cross_entropy(scores, labels.query)}
        auxiliary = self.options.AUXILIARY_WEIGHT
        if self.HSMR:
            losses["motion"] = auxiliary * self.HSMR.weight * self._motion_loss(support, query)
        if self.SPM and (self.options.SPM.TEXT_LOSS or self.options.SPM.CONSISTENCY_LOSS):
            # The remaining two of the four passes: queries with their true text, supports with generated prompts.
            query_text = texts_of_queries(class_text, labels.query)
            support_prompts = self.generated_prompts(support, class_text)
            of_query = _imitation(query_text, query_prompts, self.refine(query, query_text), query_tokens)
            support_fake = self.refine(support, support_prompts)
            of_support = _imitation(support_text, support_prompts, support_tokens, support_fake)
            losses |= self._prompt_losses(of_query, of_support)
        return EpisodeOutput(scores, losses)

    def _motion_loss(self, support: Tensor, query: Tensor) -> Tensor:
        """L_HSMR of the support videos plus that of the queries, a scalar."""
        assert self.HSMR is not None
        of_support = self.HSMR.loss(support.flatten(0, 2), self.fusion)
        return of_support + self.HSMR.loss(query.flatten(0, 1), self.fusion)

    def _prompt_losses(self, of_query: tuple[Tensor, Tensor], of_support: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """L_text and L_consistency from their query and support parts, where they are switched on."""
        options, auxiliary = self.options.SPM, self.options.AUXILIARY_WEIGHT
        losses = {}
        if options.TEXT_LOSS:
            share = options.TEXT_QUERY_WEIGHT
            losses["text"] = auxiliary * (share * of_query[0] + (0.5 - share) * of_support[0])
        if options.CONSISTENCY_LOSS:
            share = options.CONSISTENCY_QUERY_WEIGHT
            losses["consistency"] = auxiliary * (share * of_query[1] + (1 - share) * of_support[1])
        return losses

    def _true_prompts(self, support: Tensor, class_text: Tensor) -> Tensor | None:
        """Class texts [B, N, D] as the prompts of the support videos, [B, N, K, D]; None without SPM."""
        return repeat(class_text, "b n d -> b n k d", k=support.shape[2]) if self.SPM else None

    def generated_prompts(self, videos: Tensor, class_text: Tensor) -> Tensor | None:
        """Generated prompts of videos, without their class: [B, ..., T, D] -> [B, ..., D]; None without SPM."""
        if not self.SPM:
            return None
        return self.SPM.generate(videos.flatten(1, -3), class_text).unflatten(1, videos.shape[1:-2])

    def refine(self, videos: Tensor, prompts: Tensor | None) -> Tensor:
        """Refined tokens [..., 1+T, D], the prompt first, of videos [..., T, D] with prompts [..., D].

        Without prompts (SPM off) the tokens are the frames alone, [..., T, D].
        """
        flat_prompts = None if prompts is None else prompts.flatten(0, -2)
        return self.fusion(flat_prompts, videos.flatten(0, -3)).unflatten(0, videos.shape[:-2])

    def _compare(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """score = -(w1 D1 + w2 D2 + w3 D3): refined [B, N, K, T, D] and [B, Q, T, D] -> float32 [B, Q, N].

        The class texts are part of the refined features already and are not read.
        """
        options = self.options.DISTANCES
        weighted = [(options.PROTOTYPE, video_distances(query, support.mean(dim=2)))]
        if self.PADM:
            class_anchors, global_anchor, prototypes, modulated_query = self.PADM(support, query)
            weighted += [
                (options.MODULATED, video_distances(modulated_query, prototypes)),
                (options.ANCHOR, video_distances(global_anchor, class_anchors)),  # [B, 1, N, T, T]
            ]
        weights, frame_distances = zip(*weighted, strict=True)
        together = otam(torch.cat(frame_distances, dim=1), options.OTAM_LAMBDA, options.OTAM_BOTH_DIRECTIONS)
        each = together.split([part.shape[1] for part in frame_distances], dim=1)
        terms = (weight * distance for weight, distance in zip(weights, each, strict=True))
        return -sum(terms, start=together.new_zeros(()))


def _frames(tokens: Tensor, videos: Tensor) -> Tensor:
    """The refined frames among the tokens [..., 1+T, D] or [..., T, D] of videos [..., T, D]."""
    return tokens[..., -videos.shape[-2] :, :]


def _imitation(text: Tensor | None, prompts: Tensor | None, true: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of generated from true prompts, for L_text, and of the two refinements, for L_consistency.

    Args:
        text, prompts: class texts and generated prompts, float [B, ..., D].
        true, fake: tokens refined with the true and the generated prompt, float [B, ..., 1+T, D].

    Returns:
        d(w, p_gen) + d(p^ true, p^ fake), and d([p^; x^] true, [p^; x^] fake); scalars.
    """
    assert text is not None
    assert prompts is not None
    refined_prompts = squared_distance(true[..., 0, :], fake[..., 0, :], dims=1)
    return squared_distance(text, prompts, dims=1) + refined_prompts, squared_distance(true, fake, dims=2)
