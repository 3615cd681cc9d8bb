"""STRM: spatio-temporal relation modelling for few-shot action recognition (Thatipelli et al., CVPR 2022).

TRX (models/model_trx.py) after an enrichment of patches and frames, with a second score from the patches alone:

    frames -> image network -> maps -> largest values in 4 x 4 patches -> z [T, L, D], L = 16;   z <- z + pos
      PLE   y = g softmax( (W_q z + b_q)(W_k z)^T ) W_v z + z                  one head, no 1/sqrt(D); g is learned
            f_t = mean over the patches of  W_o relu( W_h relu( W_i y ) ) + y              D -> D/2 -> D/2 -> D
      FLE   x = f + pos
            x <- U_o relu( U_i x ) + x    along time, T -> T -> T;   x <- W_o relu( W_i x ) + x    D -> D -> D
    relation  = the score of TRX on x, with pairs of frames
    proximity = -1/P sum_p min_r || e_p of the query - e_r of the class ||,   e_p = relu( W [f_t1; f_t2] ), width D/2
    score = relation + 0.1 proximity;   loss: cross-entropy of relation + 0.1 cross-entropy of proximity

Where the release (github.com/Anirudh257/strm) differs: it keeps W in a plain list, so W is neither trained nor
saved, and a released checkpoint is tested with other random weights than in training. Its `proximity` cannot be
reproduced. Here W is an ordinary layer (TRAIN_PROJECTION), and its dropout is off in test runs. The release has a
bias in W_k, which cancels in the softmax, starts g at 0, and sums the cross-entropies over the queries.

No text is used; queries do not see each other.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, L patches, P tuples, D width of frames, d of keys
and values, E of projections.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from pydantic import Field
from torch import Tensor, nn

from models import register
from models.base import Episode, EpisodeLabels, EpisodeOutput, ProtocolName, cross_entropy
from models.layers import TupleLinear, sinusoid_positions
from models.model_trx import Trx, TrxOptions, TupleSizes, released_names, released_unused
from models.released import ReleasedNames, sequential_resnet


class StrmOptions(TrxOptions):
    """The `MODEL` section of STRM; the defaults are those of the released scripts, apart from GATE_START."""

    ADAPTER: Literal["none"] = Field("none", description="none: adapters are not part of the maps that PLE pools")
    TUPLES: TupleSizes = Field([2], min_length=1, description="frames in a tuple, one transformer for each number")
    PATCH_LEVEL: bool = Field(True, description="PLE; off: f is the mean of the map")
    FRAME_LEVEL: bool = Field(True, description="FLE; off: TRX uses f directly")
    MAP_SIZE: int = Field(4, ge=1, description="rows and columns of patches; smaller maps keep theirs")
    GATE_START: float = Field(
        0.1, description="initial g (released: 0, so that W_q, W_k and W_v get no gradient at first)"
    )
    FRAMES: int = Field(8, ge=1, description="T of FLE's layers along time; clips of other lengths are resampled to it")
    PROXIMITY_WEIGHT: float = Field(0.1, ge=0, description="weight of proximity in the score, and of its cross-entropy")
    TRAIN_PROJECTION: bool = Field(True, description="train W; off: it stays at its random initialisation, as released")


class PatchEnrichment(nn.Module):
    """PLE: patches of one frame attend to each other."""

    def __init__(self, width: int, options: StrmOptions) -> None:
        super().__init__()
        self.position_scale = options.POSITION_SCALE
        self.dropout = nn.Dropout(options.DROPOUT)
        self.gate = nn.Parameter(torch.full((1,), options.GATE_START))
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        half = max(1, width // 2)
        self.reduce, self.mix, self.expand = nn.Linear(width, half), nn.Linear(half, half), nn.Linear(half, width)

    def forward(self, patches: Tensor) -> Tensor:
        """Maps float [V, T, L, D] -> float [V, T, D]."""
        length, width = patches.shape[-2:]
        positions = sinusoid_positions(length, width, self.position_scale, device=patches.device)
        z = self.dropout(patches + positions)
        attended = F.scaled_dot_product_attention(self.query(z), self.key(z), self.value(z), scale=1.0)
        y = self.gate * attended + z
        return (self.expand(self.mix(self.reduce(y).relu()).relu()) + y).mean(dim=-2)


class FrameEnrichment(nn.Module):
    """FLE: mixes the frames of a video along time, in the same way for each channel, and then each frame separately."""

    def __init__(self, width: int, options: StrmOptions) -> None:
        super().__init__()
        self.position_scale, self.frames = options.POSITION_SCALE, options.FRAMES
        self.dropout = nn.Dropout(options.DROPOUT)
        self.over_time = nn.Sequential(
            nn.Linear(self.frames, self.frames), nn.ReLU(), nn.Linear(self.frames, self.frames)
        )
        self.each_frame = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, frames: Tensor) -> Tensor:
        """Maps float [V, T, D] -> float [V, T, D]."""
        length, width = frames.shape[-2:]
        x = self.dropout(frames + sinusoid_positions(length, width, self.position_scale, device=frames.device))
        x = _resampled(self.over_time(_resampled(x.mT, self.frames)), length).mT + x
        return self.each_frame(x) + x


def _resampled(sequences: Tensor, length: int) -> Tensor:
    """Interpolates linearly along the last axis: [V, D, T] -> [V, D, length]; unchanged if T is `length`."""
    if sequences.shape[-1] == length:
        return sequences
    return F.interpolate(sequences, size=length, mode="linear", align_corners=False)


@register("strm")
class Strm(Trx):
    """STRM; each query is scored alone."""

    Options = StrmOptions  # type: ignore[assignment]  # its ADAPTER accepts less
    released = ReleasedNames(
        used={
            **released_names(1),
            "attn_pat.gamma": "patch_enrichment.gate",
            "attn_pat.query_proj": "patch_enrichment.query",
            "attn_pat.key_proj": "patch_enrichment.key",
            "attn_pat.value_conv": "patch_enrichment.value",
            "attn_pat.Bot_MLP.inp_fc": "patch_enrichment.reduce",
            "attn_pat.Bot_MLP.hid_fc": "patch_enrichment.mix",
            "attn_pat.Bot_MLP.out_fc": "patch_enrichment.expand",
            "fr_enrich.Tok_MLP.inp_fc": "frame_enrichment.over_time.0",
            "fr_enrich.Tok_MLP.out_fc": "frame_enrichment.over_time.2",
            "fr_enrich.Bot_MLP.inp_fc": "frame_enrichment.each_frame.0",
            "fr_enrich.Bot_MLP.out_fc": "frame_enrichment.each_frame.2",
        },
        unused=(*released_unused(1), "attn_pat.key_proj.bias", "attn_pat.pe", "fr_enrich.pe"),
        backbone=sequential_resnet("resnet"),
        fixed={"PROXIMITY_WEIGHT": 0.0},
        rows={"TUPLE_WIDTH": "transformers.0.value.weight", "FRAMES": "frame_enrichment.over_time.0.weight"},
    )
    options: StrmOptions

    def __init__(self, options: StrmOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        width = self.encoder.drop_pooling()
        self.patch_enrichment = PatchEnrichment(width, options) if options.PATCH_LEVEL else None
        self.frame_enrichment = FrameEnrichment(width, options) if options.FRAME_LEVEL else None
        self.projections = nn.ModuleList()
        if options.PROXIMITY_WEIGHT:
            self.projections.extend(TupleLinear(width, m, max(1, width // 2)) for m in options.TUPLES)
        self.projections.requires_grad_(options.TRAIN_PROJECTION)
        self.dropout = nn.Dropout(options.DROPOUT)

    def encode(self, frames: Tensor) -> Tensor:
        """Computes f: float [V, T, 3, H, W] -> float [V, T, D]."""
        return self.encode_features(self.backbone_features(frames))

    def backbone_features(self, frames: Tensor) -> Tensor:
        """Returns max-pooled patches of the map, or its mean without PLE: [V, T, 3, H, W] -> [V, T, L, D]."""
        maps = self.encoder.feature_maps(frames)
        if not self.patch_enrichment:
            return reduce(maps, "v t h w d -> v t 1 d", "mean")
        size = [min(self.options.MAP_SIZE, length) for length in maps.shape[2:4]]
        patches = F.adaptive_max_pool2d(rearrange(maps, "v t h w d -> (v t) d h w"), size)
        return rearrange(patches, "(v t) d h w -> v t (h w) d", v=maps.shape[0])

    def encode_features(self, features: Tensor) -> Tensor:
        """Applies PLE: float [V, T, L, D] -> float [V, T, D]."""
        return self.patch_enrichment(features) if self.patch_enrichment else features.squeeze(2)

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Computes score = relation + PROXIMITY_WEIGHT * proximity; the texts are not used.

        Args:
            support: float32 [B, N, K, P, 2 d + E], keys, values and projections e, from `precompute_support`.
            query: float32 [B, Q, P, 2 d + E], from `precompute_query`.
            class_text: float [B, N, 1], not used.

        Returns:
            float32 [B, Q, N].
        """
        relation, proximity = self._scores(support, query, class_text)
        return relation + self.options.PROXIMITY_WEIGHT * proximity

    def training_losses(self, episode: Episode, labels: EpisodeLabels, protocol: ProtocolName) -> EpisodeOutput:
        """Computes the cross-entropies of relation and proximity separately.

        Args:
            episode: features from `encode`.
            labels: of the B episodes; only the queries' labels are used.
            protocol: has no effect, since queries do not see each other.

        Returns:
            scores float32 [B, Q, N] and the losses cross_entropy and, if it has a weight, proximity.
        """
        support = self.precompute_support(episode.support, episode.class_text)
        relation, proximity = self._scores(support, self.precompute_query(episode.query), episode.class_text)
        weight = self.options.PROXIMITY_WEIGHT
        losses = {"cross_entropy": cross_entropy(relation, labels.query)}
        if weight:
            losses["proximity"] = weight * cross_entropy(proximity, labels.query)
        return EpisodeOutput(relation + weight * proximity, losses)

    def _keys_and_values(self, videos: Tensor) -> Tensor:
        """Applies FLE; returns key, value and e of each tuple: float [..., T, D] -> float32 [..., P, 2 d + E]."""
        frames = videos.float()
        enriched = frames
        if self.frame_enrichment:
            enriched = self.frame_enrichment(frames.flatten(0, -3)).view_as(frames)
        keys_and_values = super()._keys_and_values(enriched)
        if not self.projections:
            return keys_and_values
        dropped = self.dropout(frames)
        projections = torch.cat([projection(dropped).relu() for projection in self.projections], dim=-2)
        return torch.cat([keys_and_values, projections], dim=-1)

    def _scores(self, support: Tensor, query: Tensor, class_text: Tensor) -> tuple[Tensor, Tensor]:
        """Computes relation and proximity from the inputs of `match`: float32 [B, Q, N]; weight 0 gives 0."""
        width = 2 * self.options.TUPLE_WIDTH  # of keys and values; projections follow
        relation = super().match(support[..., :width], query[..., :width], class_text)
        if not self.projections:
            return relation, torch.zeros_like(relation)
        pairs = zip(self._by_size(query[..., width:]), self._by_size(support[..., width:]), strict=True)
        return relation, -torch.stack([nearest_distances(*pair) for pair in pairs]).mean(dim=0)


def nearest_distances(query: Tensor, support: Tensor) -> Tensor:
    """Averages over a query's tuples the distance to the nearest tuple of each class.

    Args:
        query: float [B, Q, P, E].
        support: float [B, N, K, P, E].

    Returns:
        float [B, Q, N].
    """
    # Not by matrix products, the default of `cdist`, since they round small distances.
    distances = torch.cdist(query.flatten(1, 2), support.flatten(1, 3), compute_mode="donot_use_mm_for_euclid_dist")
    shape = {"q": query.shape[1], "n": support.shape[1]}
    nearest = reduce(distances, "b (q p) (n r) -> b q p n", "min", **shape)
    return nearest.mean(dim=2)
