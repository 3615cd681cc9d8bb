"""MoLo: motion-augmented long-short contrastive learning (Wang et al., CVPR 2023).

    frames I -> image network -> maps F [T, h, w, D];   f_t = mean of F_t over its positions
      motion      R = Conv_3x3x3(F), D / 8 wide;   M_t = Conv_3x3(R_t+1) - R_t;   m_t = mean of ReLU( Conv_1x1(M_t) )
      over time   [g;  z_1 ... z_T]     = Tr([class token; f_1 ... f_T])
                  [g'; z'_1 ... z'_T-1] = Tr'([motion token; m_1 ... m_T-1])
                  Tr(x) = ReLU( y + FFN(y) ),  y = x' + Attention(LayerNorm x'),  x' = x sqrt(D / A) + B pos
      prototype   mean of all tokens over the shots
    score = -( Bi-MHM(z of query and class) + MOTION_WEIGHT * Bi-MHM(z' of query and class) )
    loss  = CE(scores) + CLASS_WEIGHT * CE(W_class (mean of g, z + mean of g', z'), training class of the video)
            + CONTRAST_WEIGHT * ( CE(s2q) + CE(q2s) + CE(s2q') + CE(q2s') )                 long against short
                  s2q_c = -tau sum_t 1 - cos(g of the query, z_c,t),   q2s_c = -tau sum_t 1 - cos(g_c, z_t of the query)
            + RECONSTRUCTION_WEIGHT * mean ( decoder(M_t) - (I_t+1 - I_t) )^2               see `Decoder`

All tokens depend on one video, so `match` computes only prototypes and two distances. Only losses use the decoder, the
contrast and the classifier. The reconstruction needs the training frames, so TRAIN.CACHED_FEATURES is not supported.

The release (github.com/alibaba-mmai-research/MoLo) differs: its decoder only supports frames of 224 pixels, this one
supports any size; it divides all losses except the reconstruction by the 4 episodes of a step, so its rho of 0.05 is
0.2 here.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, h x w positions, D width, C training classes,
L = 2 T + 1 tokens of a video: g, z_1 ... z_T, g', z'_1 ... z'_T-1.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from models import register
from models.backbones import FrameEncoderOptions, FrameMethod
from models.base import (
    Episode,
    EpisodeLabels,
    EpisodeOutput,
    ProtocolName,
    cross_entropy,
    training_class_of_videos,
    videos_of,
)
from models.explanation import Explanation, frame_pairing
from models.layers import PositionOptions, Positions, SharedWidthOptions, TransformerLayer, released_attention_names
from models.matching import Matcher, sequence_distances, video_distances
from models.released import ReleasedNames, sequential_resnet

DECODER_WIDTHS = (128, 32, 16)  # after each of its steps


class MoloOptions(FrameEncoderOptions):
    """The `MODEL` section of MoLo; the defaults are those of the release unless stated otherwise."""

    POSITIONS: PositionOptions = PositionOptions()
    TRANSFORMER: SharedWidthOptions = SharedWidthOptions()
    MOTION_REDUCTION: int = Field(8, ge=1, description="D / width of the motion between maps")
    MOTION_WEIGHT: float = Field(0.3, ge=0, description="factor on the motion's distance (LOGIT_BALANCE_COFF)")
    MATCHER: Matcher = Field("bi-mhm", description="distance of two sequences; otam and mean are ours")
    OTAM_LAMBDA: float = Field(0.5, gt=0, description="matcher otam: smoothing of its softmin")
    OTAM_BOTH_DIRECTIONS: bool = Field(True, description="matcher otam: add the alignment with the roles exchanged")
    CLASS_WEIGHT: float = Field(0.4, ge=0, description="weight of the loss over training classes; 0: none")
    CONTRAST_WEIGHT: float = Field(0.05, ge=0, description="weight of the long-short contrast; 0: none")
    RECONSTRUCTION_WEIGHT: float = Field(
        0.0, ge=0, description="weight of the reconstruction, 4 rho of the release (its rho: 0.05 or 0.1); 0: none"
    )


class Motion(nn.Module):
    """Differences between the maps of neighbouring frames."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.width = max(1, width // reduction)
        self.reduce = nn.Conv3d(width, self.width, kernel_size=3, padding=1)
        self.shift = nn.Conv2d(self.width, self.width, kernel_size=3, padding=1)
        self.widen = nn.Conv2d(self.width, width, kernel_size=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Computes M: float [V, T, h, w, D] -> float [V, T - 1, D / 8, h, w]."""
        reduced = rearrange(self.reduce(rearrange(maps, "v t h w d -> v d t h w")), "v d t h w -> v t d h w")
        return _each_frame(self.shift, reduced[:, 1:]) - reduced[:, :-1]

    def vectors(self, motion: Tensor) -> Tensor:
        """Computes m from M: float [V, T - 1, D / 8, h, w] -> float [V, T - 1, D]."""
        return F.relu(_each_frame(self.widen, motion)).mean(dim=(-2, -1))


class Decoder(nn.Module):
    """The decoder of frame differences: upsampling, convolution and norm three times, then a 1x1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in pairwise((width, *DECODER_WIDTHS))
        )
        self.project = nn.Conv2d(DECODER_WIDTHS[-1], 3, kernel_size=1)

    def forward(self, motion: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps float [V, T - 1, D / 8, h, w] -> float [V, T - 1, 3, H, W], where `size` is H and W."""
        images = motion.flatten(0, 1)
        height, width = motion.shape[-2:]
        for step, factor in zip(self.steps, (2, 4, None), strict=True):
            height, width = (height * factor, width * factor) if factor else size
            images = step(F.interpolate(images, (height, width), mode="bilinear", align_corners=True))
        return self.project(images).unflatten(0, motion.shape[:2])


class Stream(nn.Module):
    """A token before the features of a video, and one transformer layer over time."""

    def __init__(self, width: int, options: SharedWidthOptions) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.temporal = TransformerLayer(width, options)
        self.temperature = nn.Parameter(torch.ones(1))  # tau; only the contrast uses it

    def forward(self, features: Tensor, positions: Positions) -> Tensor:
        """Maps float [V, S, D] -> float [V, 1 + S, D]."""
        tokens = torch.cat([self.token.expand(features.shape[0], -1, -1), features], dim=1)
        return F.relu(self.temporal(positions(tokens)))


class Tokens(NamedTuple):
    """The tokens of one stream: g and z_1 ... z_S."""

    long: Tensor  # float [..., 1, D]
    short: Tensor  # float [..., S, D]


def streams(tokens: Tensor) -> tuple[Tokens, Tokens]:
    """Splits the tokens of frames and motion: float [..., 2 T + 1, D] -> their tokens."""
    frames, motion = tokens.split([tokens.shape[-2] // 2 + 1, tokens.shape[-2] // 2], dim=-2)
    return Tokens(frames[..., :1, :], frames[..., 1:, :]), Tokens(motion[..., :1, :], motion[..., 1:, :])


def released_stream(suffix: str, ours: str) -> dict[str, str | Sequence[str]]:
    """Returns the names of a `Stream` in the released code."""
    layer = f"temporal_atte_before{suffix}.layers.0"
    return {
        f"class_token{suffix}": f"{ours}.token",
        f"scale{suffix}": f"{ours}.temperature",
        f"{layer}.1.net": f"{ours}.temporal.feed_forward",
        **released_attention_names(f"{layer}.0", f"{ours}.temporal.attention"),
    }


@register("molo")
class Molo(FrameMethod):
    """MoLo; each query is scored alone."""

    Options = MoloOptions
    training_only = ("classify", "decoder")
    released = ReleasedNames(
        used={
            **released_stream("", "frames"),
            **released_stream("_motion", "moving"),
            "motion_reduce": "motion.reduce",
            "motion_conv": "motion.shift",
            "motion_up": "motion.widen",
            "up1.conv.double_conv": "decoder.steps.0",
            "up2.conv.double_conv": "decoder.steps.1",
            "up3.conv.double_conv": "decoder.steps.2",
            "outc.conv": "decoder.project",
        },
        unused=("pe", "classification_layer"),
        backbone=sequential_resnet("backbone"),
        rows={"TRANSFORMER.HIDDEN": "frames.temporal.feed_forward.0.weight"},
    )

    def __init__(self, options: MoloOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        self.options = options
        self.matching = options.MATCHER, options.OTAM_LAMBDA, options.OTAM_BOTH_DIRECTIONS
        self.width = self.encoder.drop_pooling()
        self.positions = Positions(options.POSITIONS)
        self.motion = Motion(self.width, options.MOTION_REDUCTION)
        self.frames = Stream(self.width, options.TRANSFORMER)
        self.moving = Stream(self.width, options.TRANSFORMER)
        self.needs_frames = options.RECONSTRUCTION_WEIGHT > 0
        self.decoder = Decoder(self.motion.width) if self.needs_frames else None
        self.classify: nn.Linear | None = None

    def set_training_classes(self, count: int) -> None:
        """Builds the classifier of videos, if its loss has a weight."""
        if self.options.CLASS_WEIGHT:
            self.classify = nn.Linear(self.width, count)

    def encode(self, frames: Tensor) -> Tensor:
        """Computes all tokens: float [V, T, 3, H, W] -> float [V, L, D]."""
        return self.encode_features(self.backbone_features(frames))

    def backbone_features(self, frames: Tensor) -> Tensor:
        """Returns the maps F: float [V, T, 3, H, W] -> float [V, T, h, w, D]."""
        return self.encoder.feature_maps(frames)

    def encode_features(self, features: Tensor) -> Tensor:
        """Computes all tokens: float [V, T, h, w, D] -> float [V, L, D]."""
        return self._tokens(features, self.motion(features))

    def encode_for_training(self, features: Tensor, frames: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes all tokens of maps [V, T, h, w, D], and the reconstruction loss on frames [V, T, 3, H, W]."""
        motion, losses = self.motion(features), {}
        if self.decoder is not None and frames is not None and motion.shape[1]:
            decoded = self.decoder(motion, (frames.shape[-2], frames.shape[-1]))
            error = F.mse_loss(decoded.float(), frames.diff(dim=1))
            losses["reconstruction"] = self.options.RECONSTRUCTION_WEIGHT * error
        return self._tokens(features, motion), losses

    def _tokens(self, maps: Tensor, motion: Tensor) -> Tensor:
        frames = self.frames(maps.mean(dim=(2, 3)), self.positions)
        return torch.cat([frames, self.moving(self.motion.vectors(motion), self.positions)], dim=1)

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Computes the negative distance of both streams; the texts are not used.

        Args:
            support: float [B, N, K, L, D].
            query: float [B, Q, L, D].
            class_text: float [B, N, 1], not used.

        Returns:
            float32 [B, Q, N].
        """
        return self._scores(streams(support.mean(dim=2)), streams(query))

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """Returns the pairings of frames and of motion, and the tokens of the queries."""
        pairs = zip(("frames", "motion"), streams(query), streams(support.mean(dim=2)), strict=True)
        pairings = {
            name: frame_pairing(queries.short, prototypes.short, *self.matching)
            for name, queries, prototypes in pairs
            if queries.short.shape[-2]
        }
        return Explanation(pairings, {"frames and motion over time": query})

    def training_losses(self, episode: Episode, labels: EpisodeLabels, protocol: ProtocolName) -> EpisodeOutput:
        """Computes all losses except the reconstruction, which `encode_for_training` computes.

        Args:
            episode: features from `encode`.
            labels: of the B episodes.
            protocol: has no effect, since queries do not see each other.

        Returns:
            scores float32 [B, Q, N] and the losses cross_entropy, class and contrast, without those of weight 0.
        """
        prototypes, queries = streams(episode.support.mean(dim=2)), streams(episode.query)
        scores = self._scores(prototypes, queries)
        losses = {"cross_entropy": cross_entropy(scores, labels.query)}
        if self.classify is not None:
            losses["class"] = self.options.CLASS_WEIGHT * self._class_loss(episode, labels)
        if weight := self.options.CONTRAST_WEIGHT:
            temperatures = self.frames.temperature, self.moving.temperature
            contrasts = long_short_scores(prototypes, queries, temperatures).values()
            losses["contrast"] = weight * torch.stack([cross_entropy(part, labels.query) for part in contrasts]).sum()
        return EpisodeOutput(scores, losses)

    def _scores(self, prototypes: tuple[Tokens, Tokens], queries: tuple[Tokens, Tokens]) -> Tensor:
        scores, weights = torch.zeros((), device=queries[0].short.device), (1.0, self.options.MOTION_WEIGHT)
        for weight, prototype, query in zip(weights, prototypes, queries, strict=True):
            if query.short.shape[-2]:  # the motion of a single frame is an empty sequence
                scores = scores - weight * sequence_distances(query.short, prototype.short, *self.matching)
        return scores

    def _class_loss(self, episode: Episode, labels: EpisodeLabels) -> Tensor:
        """Computes the cross-entropy of all videos over the training classes, a scalar."""
        assert self.classify is not None
        pooled = sum(torch.cat(stream, dim=-2).mean(dim=-2) for stream in streams(videos_of(episode)))
        return cross_entropy(self.classify(pooled), training_class_of_videos(episode, labels))


def long_short_scores(
    prototypes: tuple[Tokens, Tokens], queries: tuple[Tokens, Tokens], temperatures: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Scores the token of a whole video against individual frames of the other one, in both directions and streams.

    Args:
        prototypes: tokens of the classes, float [B, N, ..., D].
        queries: tokens of the queries, float [B, Q, ..., D].
        temperatures: tau of frames and motion, float [1].

    Returns:
        s2q, q2s, s2q_motion and q2s_motion -> float32 [B, Q, N].
    """
    scores = {}
    for suffix, prototype, query, tau in zip(("", "_motion"), prototypes, queries, temperatures, strict=True):
        scores[f"s2q{suffix}"] = -tau * video_distances(query.long, prototype.short).sum(dim=(-2, -1))
        scores[f"q2s{suffix}"] = -tau * video_distances(query.short, prototype.long).sum(dim=(-2, -1))
    return scores


def _each_frame(layer: nn.Module, maps: Tensor) -> Tensor:
    """Applies an image layer to each frame of [V, T, D, h, w]."""
    return layer(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])
