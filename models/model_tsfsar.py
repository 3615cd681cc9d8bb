"""TS-FSAR: task-specific distance correlation matching (Long et al., AAAI 2026, arXiv 2512.11340).

    frames -> CLIP's ViT, frozen, a side network beside it                                    models/side_network.py
              -> class token c [T, d] and patches p [T, L, d] of the side network, feature e [T, D] of CLIP
      distance matrices   v_t = distance_matrices( cos(c, p_l) p_l )          [d (d + 1) / 2]    models/matching.py
      task prototype      g   = mean_t c(query) + mean over all support videos of mean_t c
      matching  (TS-DCM)  m_c = sum_ts K[t, s] cos( v_t(query), mean over the shots of class c of v_s ),  K = G g [T, T]
      text of the side    u   = mean_t W LayerNorm(c_t)                       [D]
      adapted CLIP        a   = mean_t ( (2 - rho) e_t + rho Attention(LayerNorm e)_t )    over the frames
    score = f1 log softmax(m) + f2 log softmax( s2 cos(a, w) ) + f3 log softmax( s3 cos(u, w) ),  w the class texts
    loss  = l1 CE(m) + l2 CE(z) + l3 CE( s3 cos(u, w) ) + l4 CE( s2 cos(a, w) )
            + l4 tau^2 KL( softmax(s2 cos(a, w) / tau) || softmax(z / tau) ),   z = C dropout(mean_t v_t)
            all but the first for all videos and training classes

Only m depends on the support; queries do not see each other. Where paper and release (github.com/yaozhang0417/TS-FSAR)
differ, this file follows the release: v counts the entries of A off the diagonal once; adapted CLIP comes first in the
divergence, and neither side is detached (`DETACH_ADAPTED`). The release selected its exponents f and its checkpoint on
the test classes. Its class descriptions can be used through MODEL.TEXT_FILE; by default templates describe the classes.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, L patches, C training classes, d width of the side
network, D width of CLIP's features, M = d (d + 1) / 2.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from models import register
from models.base import (
    Episode,
    EpisodeLabels,
    EpisodeOutput,
    ParameterGroup,
    ProtocolName,
    all_others,
    cross_entropy,
    training_class_of_videos,
    videos_of,
)
from models.clip_method import ClipMethod, ClipMethodOptions
from models.explanation import Explanation, Measure
from models.matching import distance_matrices, video_distances
from models.released import BACKBONE, OUR_BACKBONE, ReleasedNames, hub_tower
from models.side_network import (
    SelfAttention,
    SideNetwork,
    SideNetworkOptions,
    attention_jobs,
    initialise,
    weighted_patches,
)
from models.text import Normalisation
from models.tower_plugin import clip_feature
from utils.schema import HEAD_ONLY, Section

ADAPTER_HEADS = 8


class FusionOptions(Section):
    """The exponents of the three probabilities; the defaults are those of SSv2-Full with one shot."""

    FRAMES: float = Field(0.5, ge=0, description="f1, of the matching of frames (released: 0.15 to 0.8)")
    ADAPTED: float = Field(0.1, ge=0, description="f2, of adapted CLIP and the class text (0.05 to 0.8)")
    SIDE: float = Field(0.4, ge=0, description="f3, of the side network and the class text (0.05 to 0.4)")

    @model_validator(mode="after")
    def _check_exponents(self) -> "FusionOptions":
        if not (self.FRAMES or self.ADAPTED or self.SIDE):
            raise ValueError(
                "MODEL.FUSION.FRAMES, MODEL.FUSION.ADAPTED and MODEL.FUSION.SIDE are all 0, so every score would be 0: "
                "set one of them above 0."
            )
        return self


class LossOptions(Section):
    """The weights of the losses; the defaults are those of SSv2-Full with one shot."""

    FRAMES: float = Field(1.0, ge=0, description="l1, matching of frames")
    CLASS: float = Field(2.0, ge=0, description="l2, training class from the distance matrices (0.5 to 2)")
    SIDE: float = Field(4.0, ge=0, description="l3, text of the training class, side network (0.01 to 4)")
    ADAPTED: float = Field(0.01, ge=0, description="l4, adapted CLIP: its text and the divergence (0.01 to 6)")


class RateOptions(Section):
    """Factors on SOLVER.LR, which is that of the side network."""

    HEAD: float = Field(1.0, gt=0, description="layers from the side network to texts and training classes")
    GENERATOR: float = Field(1.0, gt=0, description="G, which computes the weights of the frame pairs (0.5 or 1)")
    ADAPTER: float = Field(1.0, gt=0, description="attention on CLIP's features (0.5 or 1)")


class TsFsarOptions(ClipMethodOptions):
    """The `MODEL` section of TS-FSAR; the defaults are those of the release for SSv2-Full with one shot."""

    BACKBONE: str = Field("ViT-B/16", min_length=1, description="one of CLIP's ViTs")
    TRAINABLE: str = Field(
        HEAD_ONLY, description="what to train of CLIP's tower besides the side network; head: nothing"
    )
    TEXT_NORMALISE: Normalisation = Field("each+mean", description="normalise to unit length: none, each, or each+mean")
    SIDE: SideNetworkOptions = SideNetworkOptions()
    DC_ALPHA: float = Field(
        0.4, gt=0, lt=1, description="power of the squared distances between channels: half of the paper's alpha"
    )
    FRAMES: int = Field(8, ge=1, description="rows and columns of K, which is interpolated for other clip lengths")
    ADAPTER_SHARE: float = Field(1.6, ge=0, le=2, description="rho, share of attention in adapted CLIP (0.4 or 1.6)")
    ADAPTED_SCALE: float = Field(100.0, gt=0, description="s2, factor on the cosine of adapted CLIP and text (or 50)")
    SIDE_SCALE: float = Field(100.0, gt=0, description="s3, factor on the cosine of the side network and text (or 50)")
    TEMPERATURE: float = Field(4.0, gt=0, description="tau of the divergence (4 or 10)")
    CLASS_DROPOUT: float = Field(0.0, ge=0, lt=1, description="dropout in front of the training classes (0 to 0.7)")
    DETACH_ADAPTED: bool = Field(False, description="ours: the divergence trains only the side network")
    FUSION: FusionOptions = FusionOptions()
    LOSSES: LossOptions = LossOptions()
    RATES: RateOptions = RateOptions()

    @property
    def key_of_backbone_layers(self) -> str:
        """See `ModelOptions`."""
        return "NAME"


class Parts(NamedTuple):
    """The parts of the output of `encode`: v [..., T, M], c [..., T, d], u and a of each frame [..., T, D]."""

    distances: Tensor
    token: Tensor
    side: Tensor
    adapted: Tensor


class Adapter(nn.Module):
    """(2 - rho) e + rho Attention(LayerNorm e) over the frames of a video: float [V, T, D] -> float [V, T, D]."""

    def __init__(self, width: int, share: float) -> None:
        super().__init__()
        self.share = share
        self.norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, ADAPTER_HEADS)

    def forward(self, features: Tensor) -> Tensor:
        """Maps float [V, T, D] -> float [V, T, D]."""
        return (2 - self.share) * features + self.share * self.attention(self.norm(features))


class TsFsarEncoder(SideNetwork):
    """The side network, followed by all layers that depend on one video."""

    def __init__(self, visual: Any, options: TsFsarOptions) -> None:
        """See `SideNetwork`."""
        super().__init__(visual, options.SIDE)
        side_width, clip_width = self.width, visual.output_dim
        self.power = options.DC_ALPHA
        self.sizes = [side_width * (side_width + 1) // 2, side_width, clip_width, clip_width]
        self.width = sum(self.sizes)
        self.text_norm = nn.LayerNorm(side_width)
        self.to_text = nn.Linear(side_width, clip_width, bias=False)
        self.adapter = Adapter(clip_width, options.ADAPTER_SHARE)
        # All of OpenAI's ViTs have features narrower than their blocks; those of tiny-vit are wider.
        if options.SIDE.INITIALISE == "clip" and clip_width <= visual.transformer.width:
            initialise(attention_jobs(self.adapter.attention, visual.transformer.resblocks[-1].attn))

    def read(self, visual: Any, levels: Iterator[Tensor]) -> Tensor:
        """Joins v, c, u and a of each frame: float [V, T, M + d + 2 D]; see `Parts`."""
        tokens, clip_tokens = self.climb(levels)
        token = tokens[:, :, 0]
        distances = distance_matrices(weighted_patches(tokens), self.power, off_diagonal=1.0)
        adapted = self.adapter(clip_feature(visual, clip_tokens))
        return torch.cat([distances, token, self.to_text(self.text_norm(token)), adapted], dim=-1)

    def parts(self, encoded: Tensor) -> Parts:
        """Splits the output of `read`: [..., T, M + d + 2 D]."""
        return Parts(*encoded.split(self.sizes, dim=-1))


RELEASED_ATTENTION = {"q_linear": "to_query", "k_linear": "to_key", "v_linear": "to_value", "proj": "project"}
RELEASED_BLOCK = {
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
    "mlp.fc1": "expand",
    "mlp.fc2": "contract",
    **{f"attn.{released}": f"attention.{name}" for released, name in RELEASED_ATTENTION.items()},
}
# The names of the weights in the released code, which uses the tower of Hugging Face's transformers.
RELEASED = ReleasedNames(
    used={
        "model.side_LN": "side.norms",
        "model.side_downsample": "side.reduce",
        "model.side_gate_params": "side.gates",
        "model.up_ln": "side.text_norm",
        "model.up_linear": "side.to_text",
        "model.Adapter.norm1": "side.adapter.norm",
        **{
            f"model.Adapter.attn.{released}": f"side.adapter.attention.{name}"
            for released, name in RELEASED_ATTENTION.items()
        },
        **{
            f"model.side_transformer.*.{released}": f"side.blocks.*.{name}" for released, name in RELEASED_BLOCK.items()
        },
        "ts_dcm.generator": "generate",
    },
    unused=("model.Linear", "model.embeddings.position_ids"),
    backbone={BACKBONE: OUR_BACKBONE, **hub_tower("model")},
    transposed=("model.projection",),
    fixed={"SIDE.INITIALISE": "random"},  # all weights come from the checkpoint
    rows={"SIDE.WIDTH": "side.reduce.0.weight"},
)


@register("tsfsar")
class TsFsar(ClipMethod):
    """TS-FSAR; each query is scored alone."""

    Options = TsFsarOptions
    training_only = ("classify",)
    released = RELEASED

    def __init__(self, options: TsFsarOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        self.options = options
        self.side = self.clip.attach(partial(TsFsarEncoder, options=options))
        self.generate = nn.Linear(options.SIDE.WIDTH, options.FRAMES**2, bias=False)
        self.dropout = nn.Dropout(options.CLASS_DROPOUT)
        self.classify: nn.Linear | None = None

    def set_training_classes(self, count: int) -> None:
        """Builds the classifier of videos, if one of its losses has a weight."""
        if self.options.LOSSES.CLASS or self.options.LOSSES.ADAPTED:
            self.classify = nn.Linear(self.side.sizes[0], count, bias=False)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Returns the group of the side network, and three groups with factors on its learning rate."""
        rates = self.options.RATES
        head = [*self.side.text_norm.parameters(), *self.side.to_text.parameters()]
        if self.classify is not None:
            head += self.classify.parameters()
        groups = [
            ParameterGroup("head", head, rates.HEAD),
            ParameterGroup("generator", list(self.generate.parameters()), rates.GENERATOR),
            ParameterGroup("adapter", list(self.side.adapter.parameters()), rates.ADAPTER),
        ]
        return [all_others("side network", self, groups), *groups]

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Computes the sum of the weighted logarithms of the three probabilities.

        Args:
            support: float [B, N, K, T, M + d + 2 D].
            query: float [B, Q, T, M + d + 2 D].
            class_text: float [B, N, D].

        Returns:
            float32 [B, Q, N].
        """
        return torch.stack(self._terms(support, query, class_text)).sum(dim=0)

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """Returns the three terms of the score."""
        terms = torch.stack(self._terms(support, query, class_text), dim=-1)
        names = ("frames", "adapted CLIP and text", "side network and text")
        meaning = "logarithms of the probabilities of a class, whose sum is the score"
        return Explanation(measures={"terms": Measure(terms, meaning, "part", names)})

    def training_losses(self, episode: Episode, labels: EpisodeLabels, protocol: ProtocolName) -> EpisodeOutput:
        """Computes the losses l1 to l4.

        Args:
            episode: features from `encode`.
            labels: of the B episodes, and the texts of all training classes.
            protocol: has no effect, since queries do not see each other.

        Returns:
            scores float32 [B, Q, N]; losses cross_entropy, side_text, adapted_text and, with a classifier, class and
            divergence.
        """
        options, weights = self.options, self.options.LOSSES
        support, query = self.side.parts(episode.support), self.side.parts(episode.query)
        frames = self.match_frames(support, query)
        classes = training_class_of_videos(episode, labels)
        videos = self.side.parts(videos_of(episode))
        adapted = text_logits(videos.adapted, labels.all_text, options.ADAPTED_SCALE)
        side = text_logits(videos.side, labels.all_text, options.SIDE_SCALE)
        losses = {
            "cross_entropy": weights.FRAMES * cross_entropy(frames, labels.query),
            "side_text": weights.SIDE * cross_entropy(side, classes),
            "adapted_text": weights.ADAPTED * cross_entropy(adapted, classes),
        }
        if self.classify is not None:
            logits = self.classify(self.dropout(videos.distances.mean(dim=2)))
            losses["class"] = weights.CLASS * cross_entropy(logits, classes)
            target = adapted.detach() if options.DETACH_ADAPTED else adapted
            losses["divergence"] = weights.ADAPTED * divergence(target, logits, options.TEMPERATURE)
        scores = self._fused(frames, query, episode.class_text)
        return EpisodeOutput(torch.stack(scores).sum(dim=0), losses)

    def match_frames(self, support: Parts, query: Parts) -> Tensor:
        """Computes m: parts of support videos [B, N, K, T, ...] and queries [B, Q, T, ...] -> float32 [B, Q, N]."""
        prototypes = support.distances.float().mean(dim=2)
        similarity = 1 - video_distances(query.distances, prototypes)
        task = query.token.float().mean(dim=2) + support.token.float().mean(dim=(1, 2, 3)).unsqueeze(1)
        weights = self.generate(task).float().unflatten(-1, (self.options.FRAMES, self.options.FRAMES))
        return (resized(weights, similarity.shape[-2:]).unsqueeze(2) * similarity).sum(dim=(-2, -1))

    def _terms(self, support: Tensor, query: Tensor, class_text: Tensor) -> list[Tensor]:
        query_parts = self.side.parts(query)
        return self._fused(self.match_frames(self.side.parts(support), query_parts), query_parts, class_text)

    def _fused(self, frames: Tensor, query: Parts, class_text: Tensor) -> list[Tensor]:
        """Computes the three weighted terms of the score, float32 [B, Q, N] each, from m and the queries."""
        options, exponents = self.options, self.options.FUSION
        adapted = text_logits(query.adapted, class_text, options.ADAPTED_SCALE)
        side = text_logits(query.side, class_text, options.SIDE_SCALE)
        terms = ((exponents.FRAMES, frames), (exponents.ADAPTED, adapted), (exponents.SIDE, side))
        return [exponent * logits.log_softmax(dim=-1) for exponent, logits in terms]


def text_logits(frames: Tensor, text: Tensor, scale: float) -> Tensor:
    """Computes scale * cos(mean over time, text): [B, V, T, D] and [B, N, D] or [C, D] -> float32 [B, V, N or C]."""
    return scale * F.normalize(frames.float().mean(dim=2), dim=-1) @ F.normalize(text.float(), dim=-1).mT


def divergence(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Computes tau^2 KL(softmax(target / tau) || softmax(logits / tau)), mean over videos: [B, V, C] -> scalar."""
    first, second = (values.float().flatten(0, 1) / temperature for values in (target, logits))
    kl = F.kl_div(second.log_softmax(dim=-1), first.log_softmax(dim=-1), reduction="batchmean", log_target=True)
    return temperature**2 * kl


def resized(weights: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes weights of frame pairs to other clip lengths: float [B, Q, T, T] -> [B, Q, *size].

    They are scaled by the ratio of the numbers of pairs, so that scores are of the same size for clips of any length.
    """
    if weights.shape[-2:] == torch.Size(size):
        return weights
    share = weights.shape[-2] * weights.shape[-1] / (size[0] * size[1])
    return share * F.interpolate(weights, size=tuple(size), mode="bilinear")
