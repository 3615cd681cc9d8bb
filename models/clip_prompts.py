"""Modules of CLIP-MEI and its successor CLIP-SPM: prompts in frames, motion, generated prompts, anchors, the score.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, D feature width.
"""

import math
from collections.abc import Sequence
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


def raise_if_no_distance(weights: DistanceOptions, module: str, enabled: bool) -> None:
    """Raises ValueError if no distance remains for the score; `module` is the section that switches the anchors."""
    if weights.PROTOTYPE or (enabled and (weights.MODULATED or weights.ANCHOR)):
        return
    raise ValueError(
        f"MODEL.DISTANCES.PROTOTYPE is 0 and there is no other distance to score with, as MODEL.{module}.ENABLED is "
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

    Motion prompts and text prompts share this module. Without a prompt, the frames pass through the transformer alone.
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
        """Refines the tokens of videos.

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
        """Computes gates of prompts and frames: float [..., T, D], float [..., D] -> float [..., 1+T, D] in (0, 1)."""
        return torch.cat([self.prompt_gate(prompts.unsqueeze(-2)), self.frame_gate(videos)], dim=-2)


class MotionPrompt(nn.Module):
    """Motion as a prompt, and the loss that pulls deep motion and the refined prompt together."""

    def __init__(self, width: int, options: MotionOptions, weight_shape: tuple[int, ...] = ()) -> None:
        """Builds the layers; a learnable weight is a scalar, or has one axis of length 1 as in released weights."""
        super().__init__()
        self.pool = options.POOL
        # No activation between the two, since the released motion extraction is affine.
        self.smooth = nn.Sequential(
            nn.Conv1d(width, width, kernel_size=3, padding=1),
            nn.Conv1d(width, width, kernel_size=3, padding=1),
        )
        weight = torch.full(weight_shape, options.WEIGHT)
        self.weight = nn.Parameter(weight) if options.LEARNABLE_WEIGHT else weight.item()

    def motion(self, frames: Tensor) -> Tensor:
        """Adds temporal differences between smoothed and plain neighbours, pooled: [V, T, D] -> [V, D]."""
        both = motion_between(frames, self.smooth)
        total = both.sum(dim=1)
        # A single frame has no neighbours; its motion is zero, not 0 / 0.
        return total if self.pool == "sum" else total / (2 * max(1, both.shape[1]))

    def weighted_loss(self, support: Tensor, query: Tensor, fusion: PromptFusion) -> Tensor:
        """Computes WEIGHT * d(motion of the refined frames, refined motion prompt) of supports, plus that of queries.

        Args:
            support, query: frames, float [B, N, K, T, D] and [B, Q, T, D].
            fusion: refines the frames, all videos in one pass.
        """
        parts = support.flatten(0, 2), query.flatten(0, 1)
        frames = torch.cat(parts)
        refined = fusion(frames, self.motion(frames))
        pairs = torch.stack([self.motion(refined[:, 1:]), refined[:, 0]], dim=1).split([len(part) for part in parts])
        of_support, of_query = (squared_distance(pair[:, 0], pair[:, 1], dims=1) for pair in pairs)
        return (self.weight * (of_support + of_query)).reshape(())


class PromptGenerator(nn.Module):
    """Prompts for videos of unknown class, generated from the class texts of the episode.

    p_gen = MLP(tau * r): tau the mean of the N class texts, r the mean of all activations of the video.

    The texts are those of the support set. The released CLIP-MEI uses the true class texts of the queries instead, and
    the released CLIP-SPM adds them. This gives the same mean if every class has the same number of queries.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.generator = feed_forward(width, hidden, dropout)

    def forward(self, videos: Tensor, class_text: Tensor) -> Tensor:
        """Generates prompts: float [B, ..., T, D], float [B, N, D] -> float [B, ..., D]."""
        token = reduce(class_text, "b n d -> b 1 d", "mean")
        response = reduce(videos.flatten(1, -3), "b v t d -> b v 1", "mean")
        return self.generator(token * response).unflatten(1, videos.shape[1:-2])


class Projections(NamedTuple):
    """The inputs of the attention among samples, linear in each sample x.

    With x' = g (x - mean x) for the weight g of the layer norm: x itself, W_query x', W_key x', and W_out W_value x'
    of each head, which is the sample's contribution to the output.
    """

    tokens: Tensor  # float [..., L, D]
    query: Tensor  # float [..., L, H, C]
    key: Tensor  # float [..., L, H, C]
    added: Tensor  # float [..., L, H, D]


class AnchorAttention(nn.Module):
    """Anchors shared by support and queries, and attention among the samples of an episode, frame by frame.

    The queries of a group enter each class anchor and attend to each other: with one group of all queries a method is
    transductive, groups of one query each are the inductive protocol.

    The attention is that of a `TransformerLayer`. An anchor z is a sum of samples, and W LayerNorm(z) is W z' / std z
    plus a constant. So each sample is projected once, support videos for all groups; anchors are sums of projections.
    """

    def __init__(self, width: int, options: TransformerOptions) -> None:
        super().__init__()
        self.among_samples = TransformerLayer(width, options)

    def forward(self, support: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Modulates the support set with each group of queries, and each group with the support set.

        Args:
            support: float [B, N, K, T, D].
            groups: float [B, G, Q, T, D], G groups of Q queries.

        Returns:
            for each group: class anchors [B, G, N, T, D], global anchor [B, G, 1, T, D], prototypes [B, G, N, T, D] and
            queries [B, G, Q, T, D].
        """
        ways, shots = support.shape[1:3]
        together = shots + groups.shape[2]
        supports = self._project(rearrange(support, "b n k t d -> b t 1 (n k) d"))
        queries = self._project(rearrange(groups, "b g q t d -> b t g q d"))
        group_sums = [part.sum(dim=3, keepdim=True) for part in queries]

        class_sums = [reduce(part, "b t g (n k) ... -> b t g n ...", "sum", n=ways) for part in supports[:3]]
        anchors = [(one + other) / together for one, other in zip(class_sums, group_sums, strict=False)]
        weights = self._weights([anchors, supports[:3]])
        # An anchor contributes through its samples, so its weight is added to theirs.
        anchor_weights = weights[..., :ways] / together
        support_weights = weights[..., ways:] + anchor_weights.repeat_interleave(shots, dim=-1)
        mixed = torch.einsum("btghrs,btgshd->btgrd", support_weights, supports.added)
        mixed = mixed + torch.einsum("btghr,btghd->btgrd", anchor_weights.sum(dim=-1), group_sums[3].squeeze(3))
        tokens = torch.cat([anchors[0], supports.tokens.expand(-1, -1, groups.shape[1], -1, -1)], dim=3)
        class_side = self._after_feed_forward(tokens, mixed, ways, shots)

        global_anchor = [part.mean(dim=3, keepdim=True) for part in anchors]
        global_added = (supports.added.sum(dim=3, keepdim=True) / ways + group_sums[3]) / together
        weights = self._weights([global_anchor, queries[:3]])
        added = torch.cat([global_added, queries.added], dim=3)
        mixed = torch.einsum("btghrs,btgshd->btgrd", weights, added)
        tokens = torch.cat([global_anchor[0], queries.tokens], dim=3)
        query_side = self._after_feed_forward(tokens, mixed, tokens.shape[3], 1)
        class_anchors, prototypes = class_side.split(ways, dim=2)
        return class_anchors, query_side[:, :, :1], prototypes, query_side[:, :, 1:]

    def _project(self, samples: Tensor) -> Projections:
        """Projects samples: float [B, T, G, L, D] -> `Projections`, each [B, T, G, L, ...]."""
        attention = self.among_samples.attention
        centred = (samples - samples.mean(dim=-1, keepdim=True)) * attention.norm.weight
        query, key, value = (
            projection(centred).unflatten(-1, (attention.heads, -1))
            for projection in (attention.to_query, attention.to_key, attention.to_value)
        )
        head_weights = attention.project.weight.unflatten(1, (attention.heads, -1))
        return Projections(samples, query, key, torch.einsum("...hc,dhc->...hd", value, head_weights))

    def _weights(self, samples: Sequence[Sequence[Tensor]]) -> Tensor:
        """Computes the weights of `added` for each sample: the attention, divided by the deviation of the sample.

        Args:
            samples: one or more kinds, each with tokens, query and key, [B, T, G or 1, L, ...].

        Returns:
            float [B, T, G, H, R, R] over the R samples of all kinds.
        """
        attention, groups = self.among_samples.attention, samples[0][0].shape[2]
        query_bias, key_bias = (
            projection(attention.norm.bias).unflatten(-1, (attention.heads, -1))
            for projection in (attention.to_query, attention.to_key)
        )
        scales = [(tokens.var(dim=-1, correction=0) + attention.norm.eps).rsqrt() for tokens, _, _ in samples]
        queries, keys = (
            [kind[part] * scale[..., None, None] + bias for kind, scale in zip(samples, scales, strict=True)]
            for part, bias in ((1, query_bias), (2, key_bias))
        )
        blocks = [[torch.einsum("btgrhc,btgshc->btghrs", query, key) for key in keys] for query in queries]
        rows = [torch.cat([block.expand(-1, -1, groups, -1, -1, -1) for block in row], dim=-1) for row in blocks]
        logits = torch.cat(rows, dim=-2) / math.sqrt(queries[0].shape[-1])
        column_scales = torch.cat([scale.expand(-1, -1, groups, -1) for scale in scales], dim=-1)
        return logits.softmax(dim=-1) * column_scales[..., None, None, :]

    def _after_feed_forward(self, tokens: Tensor, mixed: Tensor, first: int, shots: int) -> Tensor:
        """Applies the rest of the layer; averages the samples after the first ones over the shots.

        Args:
            tokens: float [B, T, G, L, D].
            mixed: float [B, T, G, L, D], the contribution of all samples to each, without the constant.
            first: number of samples that are not averaged.
            shots: K, the number of samples in each mean.

        Returns:
            float [B, G, first + (L - first) / K, T, D].
        """

        def pooled(samples: Tensor) -> Tensor:
            if shots == 1:
                return samples
            alone, averaged = samples.split([first, samples.shape[-2] - first], dim=-2)
            return torch.cat([alone, reduce(averaged, "... (n k) d -> ... n d", "mean", k=shots)], dim=-2)

        attention, feed_forward = self.among_samples.attention, self.among_samples.feed_forward
        constant = attention.project(attention.to_value(attention.norm.bias))
        if not self.training:  # the mean comes before the second linear layer, which saves time
            attended = tokens + mixed.add_(constant)
            result = pooled(attended) + feed_forward[3:](pooled(feed_forward[:3](attended)))
            return rearrange(result, "b t g l d -> b g l t d")
        # This order of axes gives the same dropout as if each group were an episode.
        added = rearrange(mixed, "b t g l d -> b g t l d").contiguous() + constant
        attended = rearrange(tokens, "b t g l d -> b g t l d") + attention.dropout(added)
        return rearrange(pooled(attended + feed_forward(attended)), "b g t l d -> b g l t d")


def anchored_scores(
    support: Tensor, groups: Tensor, anchors: AnchorAttention | None, options: DistanceOptions
) -> Tensor:
    """Computes score = -(w1 D1 + w2 D2 + w3 D3), without anchors -w1 D1.

    Args:
        support: refined frames, float [B, N, K, T, D].
        groups: refined frames of G groups of Q queries, float [B, G, Q, T, D]; queries of a group see each other.
        anchors: the attention behind D2 and D3.
        options: the weights, and the options of OTAM.

    Returns:
        float32 [B, G * Q, N].
    """
    batch, together = len(groups), groups.shape[2]
    weighted = [(options.PROTOTYPE, video_distances(groups.flatten(1, 2), support.mean(dim=2)))]
    if anchors:
        class_anchors, global_anchor, prototypes, modulated = (part.flatten(0, 1) for part in anchors(support, groups))
        modulated_distances = video_distances(modulated, prototypes)
        anchor_distances = video_distances(global_anchor, class_anchors)
        weighted += [
            (options.MODULATED, rearrange(modulated_distances, "(b g) q ... -> b (g q) ...", b=batch)),
            (options.ANCHOR, rearrange(anchor_distances, "(b g) 1 ... -> b g ...", b=batch)),
        ]
    weights, frame_distances = zip(*weighted, strict=True)
    costs = otam(torch.cat(frame_distances, dim=1), options.OTAM_LAMBDA, options.OTAM_BOTH_DIRECTIONS)
    each = list(costs.split([part.shape[1] for part in frame_distances], dim=1))
    each[2:] = [cost.repeat_interleave(together, dim=1) for cost in each[2:]]
    terms = (weight * cost for weight, cost in zip(weights, each, strict=True))
    return -sum(terms, start=costs.new_zeros(()))


def frames_of(tokens: Tensor, videos: Tensor) -> Tensor:
    """Selects the refined frames among the tokens [..., 1+T, D] or [..., T, D] of videos [..., T, D]."""
    return tokens[..., -videos.shape[-2] :, :]


def prompt_distances(text: Tensor | None, prompts: Tensor | None, true: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the distance of generated to true prompts, for L_text, and of both refinements, for L_consistency.

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
