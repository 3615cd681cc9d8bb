"""What CLIP-MEI and its successor CLIP-SPM share: prompts in frames, motion, generated prompts, anchors, the score.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, D feature width.
"""

from typing import Literal, NamedTuple

import torch
from einops import rearrange, reduce
from pydantic import Field
from torch import Tensor, nn

from models.layers import TransformerLayer, TransformerOptions, feed_forward, gate, motion_between
from models.matching import otam, squared_distance, video_distances
from utils.schema import Section


class MotionOptions(Section):
    """The motion consistency loss."""

    ENABLED: bool = Field(True, description="add the motion consistency loss")
    WEIGHT: float = Field(1.0, ge=0, description="weight of the motion loss among the auxiliary losses")
    LEARNABLE_WEIGHT: bool = Field(False, description="released code: a parameter that starts at WEIGHT")
    POOL: Literal["mean", "sum"] = Field("mean", description="mean of half the motions (code) or sum (paper)")


class AnchorOptions(Section):
    """The anchors and the attention among the samples of an episode."""

    ENABLED: bool = Field(True, description="add the two anchor-modulated distances")


class DistanceOptions(Section):
    """The three OTAM distances behind a score."""

    PROTOTYPE: float = Field(0.5, ge=0, description="weight of D1: refined prototypes and queries")
    MODULATED: float = Field(1.0, ge=0, description="weight of D2: prototypes and queries after the anchors' attention")
    ANCHOR: float = Field(1.0, ge=0, description="weight of D3: class anchors and global anchor, a class bias")
    OTAM_LAMBDA: float = Field(0.5, gt=0, description="smoothing of OTAM's softmin")
    OTAM_BOTH_DIRECTIONS: bool = Field(True, description="add the alignment with the roles exchanged")


def refuse_no_distance(weights: DistanceOptions, module: str, enabled: bool) -> None:
    """Raises a ValueError if nothing is left to score with; `module` is the section that switches the anchors."""
    if weights.PROTOTYPE or (enabled and (weights.MODULATED or weights.ANCHOR)):
        return
    raise ValueError(
        f"MODEL.DISTANCES.PROTOTYPE is 0 and no other distance is left to score with, as MODEL.{module}.ENABLED is "
        f"{str(enabled).lower()}, MODEL.DISTANCES.MODULATED {weights.MODULATED:g} and MODEL.DISTANCES.ANCHOR "
        f"{weights.ANCHOR:g}: set MODEL.DISTANCES.PROTOTYPE above 0, or one of the other two together with "
        f"MODEL.{module}.ENABLED=true."
    )


class GateSizes(NamedTuple):
    """Hidden widths of the two gates, in units of D, and the slope of their LeakyReLU below zero."""

    prompt: float
    frames: float
    slope: float


class PromptFusion(nn.Module):
    """SF, the semantic fusion: a prompt is added to the frames, then both pass one transformer layer.

    gated:    x' = alpha * p * G_p(p) + x * G_v(x)                                with gates G = sigmoid(MLP)
    additive: x' = alpha * p + x
    [p^; x^] = Transformer([p; x'])                                               the prompt itself enters ungated

    Motion prompts and text prompts share it. Without a prompt the frames pass the transformer layer alone.
    """

    def __init__(self, width: int, transformer: TransformerOptions, alpha: float, gates: GateSizes | None) -> None:
        super().__init__()
        self.temporal = TransformerLayer(width, transformer)
        self.alpha = alpha
        self.gated = gates is not None
        if gates is not None:
            self.prompt_gate = gate(width, gates.prompt, gates.slope)
            self.frame_gate = gate(width, gates.frames, gates.slope)

    def forward(self, videos: Tensor, prompts: Tensor | None) -> Tensor:
        """Refined tokens of videos.

        Args:
            videos: float [..., T, D].
            prompts: float [..., D], or None.

        Returns:
            float [..., 1+T, D], the prompt first; without prompts the refined frames, float [..., T, D].
        """
        frames = videos.flatten(0, -3)
        if prompts is None:
            return self.temporal(frames).unflatten(0, videos.shape[:-2])
        prompt = prompts.reshape(-1, 1, prompts.shape[-1])
        if self.gated:
            fused = self.alpha * prompt * self.prompt_gate(prompt) + frames * self.frame_gate(frames)
        else:
            fused = self.alpha * prompt + frames
        return self.temporal(torch.cat([prompt, fused], dim=1)).unflatten(0, videos.shape[:-2])

    def gates(self, videos: Tensor, prompts: Tensor) -> Tensor:
        """The gates of prompts and of frames: float [..., T, D], float [..., D] -> float [..., 1+T, D] in (0, 1)."""
        return torch.cat([self.prompt_gate(prompts.unsqueeze(-2)), self.frame_gate(videos)], dim=-2)


class MotionPrompt(nn.Module):
    """Motion as a prompt, and the loss that pulls deep motion and the refined prompt together."""

    def __init__(self, width: int, options: MotionOptions, weight_shape: tuple[int, ...] = ()) -> None:
        """`weight_shape` is that of a learnable weight: a scalar, or one number in an axis as in released weights."""
        super().__init__()
        self.pool = options.POOL
        # No activation between the two: the released motion extraction is affine.
        self.smooth = nn.Sequential(
            nn.Conv1d(width, width, kernel_size=3, padding=1),
            nn.Conv1d(width, width, kernel_size=3, padding=1),
        )
        weight = torch.full(weight_shape, options.WEIGHT)
        self.weight = nn.Parameter(weight) if options.LEARNABLE_WEIGHT else weight.item()

    def motion(self, frames: Tensor) -> Tensor:
        """Both temporal differences between smoothed and plain neighbours, pooled: [V, T, D] -> [V, D]."""
        both = motion_between(frames, self.smooth)
        total = both.sum(dim=1)
        # A single frame has no neighbours; its motion is zero, not 0 / 0.
        return total if self.pool == "sum" else total / (2 * max(1, both.shape[1]))

    def loss(self, frames: Tensor, fusion: PromptFusion) -> Tensor:
        """d(motion of the refined frames, refined motion prompt), not yet weighted: [V, T, D] -> scalar."""
        refined = fusion(frames, self.motion(frames))
        return squared_distance(self.motion(refined[:, 1:]), refined[:, 0], dims=1)

    def weighted_loss(self, support: Tensor, query: Tensor, fusion: PromptFusion) -> Tensor:
        """WEIGHT times the loss of the support videos [B, N, K, T, D] plus that of the queries [B, Q, T, D]."""
        unweighted = self.loss(support.flatten(0, 2), fusion) + self.loss(query.flatten(0, 1), fusion)
        return (self.weight * unweighted).reshape(())


class PromptGenerator(nn.Module):
    """Prompts for videos of unknown class, generated from the class texts of the episode.

    p_gen = MLP(tau * r): tau the mean of the N class texts, r the mean of all activations of the video.

    The texts are those of the support set. The released CLIP-MEI takes the true class texts of the queries, the
    released CLIP-SPM adds them, which changes nothing while every class has the same number of queries.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.generator = feed_forward(width, hidden, dropout)

    def forward(self, videos: Tensor, class_text: Tensor) -> Tensor:
        """Generated prompts: float [B, ..., T, D], float [B, N, D] -> float [B, ..., D]."""
        token = reduce(class_text, "b n d -> b 1 d", "mean")
        response = reduce(videos.flatten(1, -3), "b v t d -> b v 1", "mean")
        return self.generator(token * response).unflatten(1, videos.shape[1:-2])


class AnchorAttention(nn.Module):
    """Anchors shared by support and queries, and attention among the samples of an episode, frame by frame.

    All queries enter each class anchor and attend to each other: this module makes a method transductive.
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


def anchored_scores(
    support: Tensor, query: Tensor, anchors: AnchorAttention | None, options: DistanceOptions
) -> Tensor:
    """score = -(w1 D1 + w2 D2 + w3 D3), without anchors -w1 D1.

    Args:
        support: refined frames, float [B, N, K, T, D].
        query: refined frames, float [B, Q, T, D].
        anchors: the attention behind D2 and D3.
        options: the weights, and the options of OTAM.

    Returns:
        float32 [B, Q, N].
    """
    weighted = [(options.PROTOTYPE, video_distances(query, support.mean(dim=2)))]
    if anchors:
        class_anchors, global_anchor, prototypes, modulated_query = anchors(support, query)
        weighted += [
            (options.MODULATED, video_distances(modulated_query, prototypes)),
            (options.ANCHOR, video_distances(global_anchor, class_anchors)),  # [B, 1, N, T, T]
        ]
    weights, frame_distances = zip(*weighted, strict=True)
    together = otam(torch.cat(frame_distances, dim=1), options.OTAM_LAMBDA, options.OTAM_BOTH_DIRECTIONS)
    each = together.split([part.shape[1] for part in frame_distances], dim=1)
    terms = (weight * distance for weight, distance in zip(weights, each, strict=True))
    return -sum(terms, start=together.new_zeros(()))


def frames_of(tokens: Tensor, videos: Tensor) -> Tensor:
    """The refined frames among the tokens [..., 1+T, D] or [..., T, D] of videos [..., T, D]."""
    return tokens[..., -videos.shape[-2] :, :]


def imitation(text: Tensor | None, prompts: Tensor | None, true: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
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
