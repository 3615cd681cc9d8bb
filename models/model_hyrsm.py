"""HyRSM: hybrid relation guided set matching (Wang et al., CVPR 2022), with HyRSM++'s loss (arXiv 2301.03330).

    frames -> image network -> f [T, D];   x = f sqrt(D / A) + B pos
      within a video    u = ReLU( x + Attention(LayerNorm x) )                              over its frames
      prototype         P_c = mean of u over the shots of class c
      across videos     r = ReLU( LayerNorm( z + W_o Attention(z) ) ),   z = [mean_t P_1, ..., mean_t P_N, mean_t u]
                        one set of tokens for each query: the classes of its episode and itself, no other query
                        s_c,t = W [P_c,t; r_c] + b,   q_t = W [u_t; r of the query] + b
      set matching      D_c(t, l) = 1 - cos(q_t, s_c,l)
    score = -( sum_t min_l D_c + sum_l min_t D_c )                                          Bi-MHM
    loss  = CE(scores) + CLASS_WEIGHT * CE(W_class u_t, training class of the video)        every frame of every video
            + COHERENCE.WEIGHT * L_tc                                                       HyRSM++, see `incoherence`

W is split into [W_f | W_r]. W_f u_t + b is computed once for each video; since it is linear, its mean over the shots is
that of the prototype. Only W_r r is computed for each pair of a query and a class. A query is related to the support
only, so queries do not see each other. No text is used.

Where paper and release (github.com/alibaba-mmai-research/HyRSM, .../HyRSMPlusPlus) differ: the paper's Bi-MHM uses
means, the release sums. The release's one-shot head keeps every support video as a separate entry (SHOT_POOL:
distances); with one shot both are the same. Its losses are divided by the 4 episodes of a step, ours by
TRAIN.TASKS_PER_BATCH.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, D width, E entries of the support (N, or N * K),
C training classes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from pydantic import Field
from torch import Tensor, nn

from models import register
from models.adapters import AdapterChoice
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
from models.explanation import Explanation, pair_weights
from models.layers import Attention, AttentionOptions, PositionOptions, Positions, released_attention_names
from models.matching import bi_mhm
from models.released import ReleasedNames, sequential_resnet
from utils.schema import Section


class RelationOptions(Section):
    """The attention across videos."""

    HEADS: int = Field(8, ge=1, description="attention heads, which share the features' width")
    DROPOUT: float = Field(0.05, ge=0, lt=1, description="dropout after the output projection")
    WEIGHT_DROPOUT: float = Field(0.1, ge=0, lt=1, description="dropout on the attention's weights")


class CoherenceOptions(Section):
    """The temporal coherence loss of HyRSM++; the defaults of WINDOW, SIGMA and BETA are its values for SSv2-Full."""

    WEIGHT: float = Field(0.0, ge=0, description="weight of the loss; 0: HyRSM (HyRSM++: 0.1 to 0.3)")
    WINDOW: int = Field(1, ge=0, description="w: frames at most this far apart count as near")
    SIGMA: float = Field(51.0, gt=0, description="the higher, the slower the distance required of far frames grows")
    BETA: float = Field(10.0, ge=0, description="factor on the far frames' part")


class HyrsmOptions(FrameEncoderOptions, AdapterChoice):
    """The `MODEL` section of HyRSM; the defaults are those of the release."""

    POSITIONS: PositionOptions = PositionOptions()
    ATTENTION: AttentionOptions = AttentionOptions()
    RELATION: RelationOptions = RelationOptions()
    SHOT_POOL: Literal["features", "distances"] = Field(
        "features", description="mean over the shots of the frames into a prototype, or of the distances"
    )
    CLASS_WEIGHT: float = Field(0.15, ge=0, description="weight of the loss over training classes; 0: none")
    COHERENCE: CoherenceOptions = CoherenceOptions()


class Relation(nn.Module):
    """Attention over the classes of an episode and one query, followed by a norm."""

    def __init__(self, width: int, options: RelationOptions) -> None:
        super().__init__()
        inner = options.HEADS * max(1, width // options.HEADS)
        self.heads, self.weight_dropout = options.HEADS, options.WEIGHT_DROPOUT
        self.to_query = nn.Linear(width, inner, bias=False)
        self.to_key = nn.Linear(width, inner, bias=False)
        self.to_value = nn.Linear(width, inner, bias=False)
        self.project = nn.Linear(inner, width)
        self.dropout = nn.Dropout(options.DROPOUT)
        self.norm = nn.LayerNorm(width)

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        """Relates each query to the support, and vice versa.

        Args:
            support: a token for each entry, float [B, E, D].
            query: a token for each query, float [B, Q, D].

        Returns:
            float [B, Q, E + 1, D], the entries and then the query.
        """
        query_heads, key, value = (
            rearrange(with_each_query(project(support), project(query)), "b q e (h c) -> b q h e c", h=self.heads)
            for project in (self.to_query, self.to_key, self.to_value)  # before the tokens are repeated for each query
        )
        dropout = self.weight_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query_heads, key, value, dropout_p=dropout)
        related = self.dropout(self.project(rearrange(mixed, "b q h e c -> b q e (h c)")))
        return F.relu(self.norm(with_each_query(support, query) + related))


def with_each_query(support: Tensor, query: Tensor) -> Tensor:
    """Appends each query to the tokens of the support: [B, E, D] and [B, Q, D] -> [B, Q, E + 1, D]."""
    return torch.cat([repeat(support, "b e d -> b q e d", q=query.shape[1]), query.unsqueeze(2)], dim=2)


@register("hyrsm")
class Hyrsm(FrameMethod):
    """HyRSM, or HyRSM++ if COHERENCE.WEIGHT is above 0; each query is scored alone."""

    Options = HyrsmOptions
    training_only = ("classify",)
    released = ReleasedNames(
        used={
            **released_attention_names("temporal_atte_before", "within"),
            "temporal_atte.w_qs": "across.to_query",
            "temporal_atte.w_ks": "across.to_key",
            "temporal_atte.w_vs": "across.to_value",
            "temporal_atte.fc": "across.project",
            "temporal_atte.layer_norm": "across.norm",
            "layer2.0": "combine",
        },
        unused=("pe", "classification_layer"),
        backbone=sequential_resnet("backbone"),
    )

    def __init__(self, options: HyrsmOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        self.options = options
        width = self.encoder.width
        self.positions = Positions(options.POSITIONS)
        self.within = Attention(width, options.ATTENTION)
        self.across = Relation(width, options.RELATION)
        self.combine = nn.Conv1d(2 * width, width, kernel_size=1)  # W and b
        self.classify: nn.Linear | None = None

    def set_training_classes(self, count: int) -> None:
        """Builds the classifier of individual frames, if its loss has a weight."""
        if self.options.CLASS_WEIGHT:
            self.classify = nn.Linear(self.encoder.width, count)

    def encode(self, frames: Tensor) -> Tensor:
        """Computes u: float [V, T, 3, H, W] -> float [V, T, D]."""
        return self.encode_features(self.backbone_features(frames))

    def backbone_features(self, frames: Tensor) -> Tensor:
        """Computes f: float [V, T, 3, H, W] -> float [V, T, D]."""
        return self.encoder(frames)

    def encode_features(self, features: Tensor) -> Tensor:
        """Computes u from f: float [V, T, D] -> float [V, T, D]."""
        placed = self.positions(features)
        return F.relu(placed + self.within(placed))

    def precompute_support(self, support: Tensor, class_text: Tensor) -> Tensor:
        """Returns the mean of u over time, then W_f u_t + b: float [B, N, K, T, D] -> float [B, N, K, 1 + T, D]."""
        return self._token_and_frames(support)

    def precompute_query(self, query: Tensor) -> Tensor:
        """Returns the mean of u over time, then W_f u_t + b: float [B, Q, T, D] -> float [B, Q, 1 + T, D]."""
        return self._token_and_frames(query)

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Computes score = -(Bi-MHM of the related query and class); the texts are not used.

        Args:
            support: float [B, N, K, 1 + T, D], from `precompute_support`.
            query: float [B, Q, 1 + T, D], from `precompute_query`.
            class_text: float [B, N, 1], not used.

        Returns:
            float32 [B, Q, N].
        """
        return self._scores(*self._related(support, query), support.shape[1])

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """Returns the nearest frames (averaged over the shots if each is compared) and the related queries."""
        related = self._related(self._token_and_frames(support), self._token_and_frames(query))
        pairing = pair_weights(bi_mhm, distances(*related))
        pairing = reduce(pairing, "b q (n k) t s -> b q n t s", "mean", n=support.shape[1])
        return Explanation({"bi-mhm": pairing}, {"relation": related[1]})

    def training_losses(self, episode: Episode, labels: EpisodeLabels, protocol: ProtocolName) -> EpisodeOutput:
        """Computes CE(scores), CE over the training classes and the temporal coherence.

        Args:
            episode: features from `encode`.
            labels: of the B episodes.
            protocol: has no effect, since queries do not see each other.

        Returns:
            scores float32 [B, Q, N] and the losses cross_entropy, class and coherence, without those of weight 0.
        """
        related = self._related(self._token_and_frames(episode.support), self._token_and_frames(episode.query))
        scores = self._scores(*related, episode.support.shape[1])
        losses = {"cross_entropy": cross_entropy(scores, labels.query)}
        if self.classify is not None:
            losses["class"] = self.options.CLASS_WEIGHT * class_loss(self.classify, episode, labels)
        if weight := self.options.COHERENCE.WEIGHT:
            support_part, query_part = (incoherence(frames, self.options.COHERENCE) for frames in related)
            losses["coherence"] = weight * (support_part + query_part)
        return EpisodeOutput(scores, losses)

    def _token_and_frames(self, videos: Tensor) -> Tensor:
        """Joins the mean over time and W_f u_t + b: [..., T, D] -> [..., 1 + T, D]."""
        frames = F.linear(videos, self._blocks()[0], self.combine.bias)
        return torch.cat([videos.mean(dim=-2, keepdim=True), frames], dim=-2)

    def _blocks(self) -> tuple[Tensor, Tensor]:
        """Returns W_f and W_r, float [D, D] each."""
        frame_block, relation_block = self.combine.weight.squeeze(-1).chunk(2, dim=1)
        return frame_block, relation_block

    def _related(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Computes s and q from the precomputed features: float [B, Q, E, T, D] and [B, Q, T, D]."""
        entries = support.mean(dim=2) if self.options.SHOT_POOL == "features" else support.flatten(1, 2)
        relation = F.linear(self.across(entries[:, :, 0], query[:, :, 0]), self._blocks()[1])
        support_relation, query_relation = relation[:, :, :-1, None], relation[:, :, -1, None]
        return entries[:, None, :, 1:] + support_relation, query[:, :, 1:] + query_relation

    def _scores(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Computes scores: float [B, Q, E, T, D] and [B, Q, T, D] -> float32 [B, Q, N]."""
        return -reduce(bi_mhm(distances(support, query)), "b q (n k) -> b q n", "mean", n=ways)


def distances(support: Tensor, query: Tensor) -> Tensor:
    """Computes 1 - cos of all pairs of frames: float [B, Q, E, S, D] and [B, Q, T, D] -> float32 [B, Q, E, T, S]."""
    return 1 - F.normalize(query.float(), dim=-1).unsqueeze(2) @ F.normalize(support.float(), dim=-1).mT


def class_loss(classify: nn.Linear, episode: Episode, labels: EpisodeLabels) -> Tensor:
    """Averages the cross-entropy over the training classes of every frame of all videos, a scalar."""
    frames, classes = videos_of(episode), training_class_of_videos(episode, labels)
    return cross_entropy(classify(frames.flatten(1, 2)), repeat(classes, "b v -> b (v t)", t=frames.shape[2]))


def incoherence(frames: Tensor, options: CoherenceOptions) -> Tensor:
    """Computes R of HyRSM++: near frames should be similar, and far frames at least I_ij apart.

    With d_ij = 1 - cos(x_i, x_j) and g = |i - j|, the mean over all pairs of frames of all videos of
        d_ij / (g^2 + 1)                        for g <= w
        beta ReLU( I_ij - d_ij )                for g > w,  I_ij = 1 - exp( -(g - w)^2 / sigma )

    Args:
        frames: float [..., T, D].
        options: w, sigma and beta.

    Returns:
        scalar.
    """
    unit = F.normalize(frames.float(), dim=-1)
    distance = 1 - unit @ unit.mT
    time = torch.arange(frames.shape[-2], device=frames.device)
    gap = (time[:, None] - time).abs()
    required = 1 - torch.exp(-((gap - options.WINDOW) ** 2) / options.SIGMA)
    far = options.BETA * F.relu(required - distance)
    return torch.where(gap <= options.WINDOW, distance / (gap**2 + 1), far).mean()
