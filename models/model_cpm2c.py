"""CLIP-CPM2C: consistency prototypes and motion compensation (Neurocomputing 2025, arXiv 2312.01083).

    frames -> CLIP image tower -> f [T, D]          class names -> CLIP text tower -> w [D]
      motion compensation     a second stream m [T-1, D] from neighbouring frames
      consistency prototypes  support videos are refined with their class text w; a query has no label, so a learned
                              class token replaces it, t_a for the frames and t_m for the motion; a loss pulls the
                              refinements of a video by text and by token together
    score = -( OTAM(prototype, query) + OTAM(motion prototype, query motion) )        (DISTANCES can weigh the two)

The defaults are the variant for which the CLIP-SPM authors published weights (16 prompts, gated fusion, motion
at several scales); `FUSION: additive`, `MOTION: two-convolutions`, `TEXT_TEMPLATES: photo` give the method as its
authors describe it. The authors' repository adds the text of a query's true class to the features that it scores, even
in test runs; here only the consistency loss uses the true text of a query, never a score.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, D feature width, C training classes.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from models import register
from models.adapter_aim import AimChoice
from models.base import Episode, EpisodeLabels, EpisodeOutput, ProtocolName, cross_entropy, texts_of_queries
from models.clip_method import ClipMethod, ClipMethodOptions, video_text_loss
from models.explanation import Explanation, frame_pairing, motion_measure
from models.layers import (
    ONE_HEAD,
    SharedWidthOptions,
    TransformerLayer,
    gate,
    layer_rows,
    motion_between,
    released_layer_names,
)
from models.matching import Matcher, cosine_distances, sequence_distances, squared_distance
from models.released import ReleasedNames
from utils.schema import Section

# The names of the weights in the released code.
RELEASED = ReleasedNames(
    used={
        "scale": "scale",
        "class_token": "appearance_token",
        "class_token_motion": "motion_token",
        "motion_conv1_1": "motion.smooth.convolutions.0",
        "motion_conv1_3": "motion.smooth.convolutions.1",
        "motion_conv1_5": "motion.smooth.convolutions.2",
        "scale_conv": "motion.smooth.combine",
        "gate_text": "fusion.prompt_gate",
        "gate_vision": "fusion.frame_gate",
        **released_layer_names("context2", "fusion.temporal"),
    },
    unused=("frame_position_embeddings", "transformer.resblocks", "meta_net", "meta_net_2"),
    fixed=ONE_HEAD,
    rows=layer_rows("fusion.temporal"),
    ratios={
        "GATES.TEXT_HIDDEN": "fusion.prompt_gate.0.weight",
        "GATES.VISION_HIDDEN": "fusion.frame_gate.0.weight",
    },
)


class GateOptions(Section):
    """The gated fusion, x' = ALPHA * p * G_p(p) + x * G_v(x)."""

    ALPHA: float = Field(0.2, ge=0, description="factor on the gated prompt")
    TEXT_HIDDEN: float = Field(1.5, gt=0, description="hidden width of the prompt's gate, in units of D")
    VISION_HIDDEN: float = Field(0.5, gt=0, description="hidden width of the frames' gate, in units of D")
    NEGATIVE_SLOPE: float = Field(0.0025, ge=0, description="slope of the gates' LeakyReLU below zero")


class DistanceOptions(Section):
    """The local distance behind a score, the weighted sum over both streams.

    The released code has one factor for a stream's distances and its part of the consistency: normal_coeff for
    APPEARANCE here and in LOSSES, motion_coeff for MOTION. Its config for UCF101 sets motion_coeff to 0, the others 1.
    """

    APPEARANCE: float = Field(1.0, ge=0, description="the frames' part of the distances (normal_coeff)")
    MOTION: float = Field(1.0, ge=0, description="the motion's part of the distances (motion_coeff)")
    MATCHER: Matcher = Field("otam", description="distance of two sequences")
    OTAM_LAMBDA: float = Field(0.5, gt=0, description="smoothing of OTAM's softmin")
    OTAM_BOTH_DIRECTIONS: bool = Field(True, description="add the alignment with the roles exchanged")

    @model_validator(mode="after")
    def _check_distances(self) -> "DistanceOptions":
        if not (self.APPEARANCE or self.MOTION):
            raise ValueError(
                "MODEL.DISTANCES.APPEARANCE and MODEL.DISTANCES.MOTION are both 0, so there is no distance to score "
                "with: set one of them above 0."
            )
        return self


class LossOptions(Section):
    """Weights of the losses; cross-entropies are means over videos. A loss with weight 0 is not computed."""

    LOCAL: float = Field(1.0, gt=0, description="cross-entropy of the scores (lambdas[1])")
    VIDEO_TEXT: float = Field(0.5, ge=0, description="each video against the text of all training classes (lambdas[0])")
    GLOBAL: float = Field(0.0, ge=0, description="cross-entropy of the global distance (lambdas[2])")
    CONSISTENCY: float = Field(0.001, ge=0, description="class text and class token refine alike")
    APPEARANCE: float = Field(1.0, ge=0, description="the frames' part of the consistency (normal_coeff)")
    MOTION: float = Field(1.0, ge=0, description="the motion's part of the consistency (motion_coeff)")


class Cpm2cOptions(ClipMethodOptions, AimChoice):
    """The `MODEL` section of CPM2C."""

    FUSION: Literal["gated", "additive"] = Field("gated", description="how a prompt enters the frames; paper: additive")
    TOKEN_DEVIATION: float = Field(
        1.0, ge=0, description="standard deviation of the class tokens before training (released code: 1)"
    )
    ADDED: float = Field(0.1, ge=0, description="additive fusion: factor on the prompt")
    GATES: GateOptions = GateOptions()
    MOTION: Literal["multi-scale", "two-convolutions"] = Field(
        "multi-scale", description="convolutions over time of the motion stream; paper: two-convolutions"
    )
    MOTION_RESIDUAL: float = Field(0.1, gt=0, description="multi-scale motion: factor on the convolutions' result")
    TRANSFORMER: SharedWidthOptions = SharedWidthOptions()
    DISTANCES: DistanceOptions = DistanceOptions()
    LOSSES: LossOptions = LossOptions()


class Streams(NamedTuple):
    """Features, prompts or refined tokens of the same videos, for both streams.

    Features: appearance float [..., T, D] and motion float [..., T-1, D]. Refined tokens: one more, the prompt, first.
    """

    appearance: Tensor
    motion: Tensor


# --- Motion compensation ----------------------------------------------------------------------------------


class MultiScale(nn.Module):
    """Phi(x) = x + r * W [c1(x); c3(x); c5(x)]: convolutions that see 1, 3 and 5 frames."""

    def __init__(self, width: int, residual: float) -> None:
        super().__init__()
        self.residual = residual
        self.convolutions = nn.ModuleList(
            [
                nn.Conv1d(width, width, kernel_size=1),
                nn.Conv1d(width, width, kernel_size=3, padding=1),
                nn.Conv1d(width, width, kernel_size=3, padding=2, dilation=2),  # three taps over five frames
            ]
        )
        self.combine = nn.Conv1d(3 * width, width, kernel_size=1)

    def forward(self, channels: Tensor) -> Tensor:
        """Maps float [V, D, T] -> float [V, D, T]."""
        scales = torch.cat([convolution(channels) for convolution in self.convolutions], dim=1)
        return channels + self.residual * self.combine(scales)


class Motion(nn.Module):
    """The motion stream: m = (m_forward + m_backward) / 2 of each pair of neighbouring frames."""

    def __init__(self, width: int, options: Cpm2cOptions) -> None:
        super().__init__()
        self.smooth: nn.Module
        if options.MOTION == "multi-scale":
            self.smooth = MultiScale(width, options.MOTION_RESIDUAL)
        else:  # no activation between the two, so Phi is affine
            self.smooth = nn.Sequential(*(nn.Conv1d(width, width, kernel_size=3, padding=1) for _ in range(2)))

    def forward(self, frames: Tensor) -> Tensor:
        """Computes the motion [..., T-1, D] of videos [..., T, D]; a single frame has no motion.

        The sum of both differences equals that of Phi(x) - x at the two frames: it contains what the convolutions add,
        not the difference of the frames.
        """
        return 0.5 * motion_between(frames, self.smooth)


# --- Consistency prototypes -------------------------------------------------------------------------------


class Fusion(nn.Module):
    """[p^; x^] = Transformer([p; x']), one transformer layer over time for both streams and every kind of prompt.

    gated: x' = alpha * p * G_p(p) + x * G_v(x) with gates G = sigmoid(MLP); additive: x' = x + 0.1 p.
    """

    def __init__(self, width: int, options: Cpm2cOptions) -> None:
        super().__init__()
        self.temporal = TransformerLayer(width, options.TRANSFORMER)
        self.gated = options.FUSION == "gated"
        self.factor = options.GATES.ALPHA if self.gated else options.ADDED
        if self.gated:
            self.prompt_gate = gate(width, options.GATES.TEXT_HIDDEN, options.GATES.NEGATIVE_SLOPE)
            self.frame_gate = gate(width, options.GATES.VISION_HIDDEN, options.GATES.NEGATIVE_SLOPE)

    def forward(self, features: Tensor, prompts: Tensor) -> Tensor:
        """Refines tokens, the prompt first.

        Args:
            features: frames or motion, float [..., T, D].
            prompts: one per video, float [..., D], broadcast over the leading axes.

        Returns:
            float [..., 1+T, D].
        """
        videos = features.shape[:-2]
        prompts = prompts.unsqueeze(-2).expand(*videos, 1, -1)
        if self.gated:
            fused = self.factor * prompts * self.prompt_gate(prompts) + features * self.frame_gate(features)
        else:
            fused = features + self.factor * prompts
        tokens = torch.cat([prompts, fused], dim=-2)  # the prompt itself enters ungated
        return self.temporal(tokens.flatten(0, -3)).unflatten(0, videos)


# --- The method -------------------------------------------------------------------------------------------


@register("cpm2c")
class Cpm2c(ClipMethod):
    """CLIP-CPM2C; each query is scored alone."""

    Options = Cpm2cOptions
    released = RELEASED

    def __init__(self, options: Cpm2cOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        self.options = options
        distances = options.DISTANCES
        self.matching = distances.MATCHER, distances.OTAM_LAMBDA, distances.OTAM_BOTH_DIRECTIONS
        width = self.clip.width
        self.motion = Motion(width, options)
        self.fusion = Fusion(width, options)
        self.appearance_token = nn.Parameter(options.TOKEN_DEVIATION * torch.randn(1, 1, width))
        self.motion_token = nn.Parameter(options.TOKEN_DEVIATION * torch.randn(1, 1, width))
        # 1 / temperature starts at 1 as released, not at CLIP's 100; only the video-text loss uses it.
        self.scale = nn.Parameter(torch.ones(1)) if options.LOSSES.VIDEO_TEXT else None

    def precompute_support(self, support: Tensor, class_text: Tensor) -> Tensor:
        """Refines both streams with the class text, without the prompts: [B, N, K, T, D] -> [B, N, K, 2T-1, D]."""
        return _without_prompts(self._refine(self._streams(support), _text_prompts(class_text.unsqueeze(2))))

    def precompute_query(self, query: Tensor) -> Tensor:
        """Refines both streams with the class tokens, without the prompts: [B, Q, T, D] -> [B, Q, 2T-1, D]."""
        return _without_prompts(self._refine(self._streams(query), self._token_prompts()))

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Computes the negative local distance; the support already contains the class texts.

        Args:
            support: float [B, N, K, 2T-1, D], from `precompute_support`.
            query: float [B, Q, 2T-1, D], from `precompute_query`.
            class_text: float [B, N, D].

        Returns:
            float32 [B, Q, N].
        """
        scores = support.new_zeros(())
        streams = _split(support.mean(dim=2)), _split(query)
        for weight, prototypes, queries in zip(self._stream_weights(), *streams, strict=True):
            if prototypes.shape[-2]:  # the motion of a single frame is an empty sequence
                scores = scores - weight * sequence_distances(queries, prototypes, *self.matching)
        return scores

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """Returns the pairings and the refined queries of both streams, and the strength of the motion."""
        prototypes = _split(self.precompute_support(support, class_text).mean(dim=2))
        refined = _split(self.precompute_query(query))
        used = [name for name in Streams._fields if getattr(refined, name).shape[-2]]
        return Explanation(
            {name: frame_pairing(getattr(refined, name), getattr(prototypes, name), *self.matching) for name in used},
            {f"fusion, {name}": getattr(refined, name) for name in used},
            {"motion": motion_measure(self.motion(query))},
        )

    def training_losses(self, episode: Episode, labels: EpisodeLabels, protocol: ProtocolName) -> EpisodeOutput:
        """Computes L = LOCAL * CE(local) + VIDEO_TEXT * CE(video-text) + GLOBAL * CE(global) + CONSISTENCY * L_cons.

        Args:
            episode: features from `encode`, [B, N, K, T, D] and [B, Q, T, D].
            labels: of the B episodes.
            protocol: has no effect, since queries do not see each other.

        Returns:
            scores float32 [B, Q, N] and the losses cross_entropy, video_text, global and consistency, without those
            of weight 0.
        """
        weights = self.options.LOSSES
        support, query = self._streams(episode.support), self._streams(episode.query)
        support_text = _text_prompts(episode.class_text.unsqueeze(2))
        support_tokens = self._refine(support, support_text)
        query_tokens = self._refine(query, self._token_prompts())

        scores = self.match(_without_prompts(support_tokens), _without_prompts(query_tokens), episode.class_text)
        losses = {"cross_entropy": weights.LOCAL * cross_entropy(scores, labels.query)}
        if self.scale is not None:
            losses["video_text"] = weights.VIDEO_TEXT * video_text_loss(episode, labels, self.scale)
        if weights.GLOBAL:
            global_scores = -self.global_distances(support_tokens, query_tokens)
            losses["global"] = weights.GLOBAL * cross_entropy(global_scores, labels.query)
        if weights.CONSISTENCY:
            # The other prompt of each video: the tokens for the supports, the true class text for the queries.
            query_text = _text_prompts(texts_of_queries(episode.class_text, labels.query))
            query_part = self._inconsistency(query_tokens, self._refine(query, query_text))
            support_part = self._inconsistency(support_tokens, self._refine(support, self._token_prompts()))
            losses["consistency"] = weights.CONSISTENCY * (query_part + support_part)
        return EpisodeOutput(scores, losses)

    def _streams(self, videos: Tensor) -> Streams:
        """Returns frames and motion of videos [..., T, D]."""
        return Streams(videos, self.motion(videos))

    def _token_prompts(self) -> Streams:
        """Returns the learned class tokens t_a and t_m, the same for all videos, [1, 1, D]."""
        return Streams(self.appearance_token, self.motion_token)

    def _refine(self, features: Streams, prompts: Streams) -> Streams:
        """Refines features with the prompts [..., D] of either stream: tokens [..., 1+T, D] and [..., T, D]."""
        return Streams(*(self.fusion(stream, prompt) for stream, prompt in zip(features, prompts, strict=True)))

    def _stream_weights(self) -> tuple[float, float]:
        """Returns the factors of the distances of the frames and of the motion."""
        return self.options.DISTANCES.APPEARANCE, self.options.DISTANCES.MOTION

    def global_distances(self, support_tokens: Streams, query_tokens: Streams) -> Tensor:
        """Sums the cosine distances of the support videos' refined prompts to every refined token of a query.

        The two streams have the same weights as in the local distance.

        Args:
            support_tokens: float [B, N, K, 1+T, D] and [B, N, K, T, D].
            query_tokens: float [B, Q, 1+T, D] and [B, Q, T, D].

        Returns:
            float32 [B, Q, N]; the sum over shots too, not the mean, as released.
        """
        distances = []
        for support, query in zip(support_tokens, query_tokens, strict=True):
            prompts = support[..., 0, :].unsqueeze(1)  # [B, 1, N, K, D]
            distances.append(cosine_distances(query.unsqueeze(2), prompts).sum(dim=(-2, -1)))
        appearance, motion = self._stream_weights()
        return appearance * distances[0] + motion * distances[1]

    def _inconsistency(self, first: Streams, second: Streams) -> Tensor:
        """Computes L_cons of one set of videos: the distance of two refinements in both streams, a scalar."""
        weights = self.options.LOSSES
        appearance = squared_distance(first.appearance, second.appearance, dims=2)
        return weights.APPEARANCE * appearance + weights.MOTION * squared_distance(first.motion, second.motion, dims=2)


def _text_prompts(text: Tensor) -> Streams:
    """Returns the class texts as prompts of both streams."""
    return Streams(text, text)


def _split(videos: Tensor) -> Streams:
    """Inverts the joining of `_without_prompts`: [..., 2T-1, D] -> [..., T, D] and [..., T-1, D]."""
    frames = (videos.shape[-2] + 1) // 2
    return Streams(*videos.split([frames, frames - 1], dim=-2))


def _without_prompts(tokens: Streams) -> Tensor:
    """Removes the prompts and joins both streams: [..., 1+T, D] and [..., T, D] -> [..., 2T-1, D]."""
    return torch.cat([stream[..., 1:, :] for stream in tokens], dim=-2)
