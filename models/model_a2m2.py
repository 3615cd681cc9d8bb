"""A2M2-Net: adaptively aligned multi-scale second-order moments (arXiv 2509.17638, IJCV). A RECONSTRUCTION.

Neither the paper's equations nor its code could be obtained, only its abstract and second-hand summaries. This file
rebuilds what they describe, second-order descriptors at several spatio-temporal scales and candidates that are selected
and aligned instance by instance through optimal transport, from published parts: the covariance pooling of the first
author's TCP (NeurIPS 2021) with the matrix square root of iSQRT-COV (CVPR 2018), and DeepEMD's transport between two
weighted sets (CVPR 2020). Options that we added are marked as ours. The numbers are ours too, never the paper's.

    frames -> backbone -> maps [T, h, w, D] -> 1x1 convolution -> x [T, h, w, d]
      M2   for every window of time and region of the map, at every scale: the moment P = mean of x x^T,
           u = upper triangle of sqrt( P / trace P )
      A2   at every scale: C_ij = 1 - cos(u_i of the query, u_j of the class)
           a_i = softmax_i( w relu( W [place_i; u_i] + c + W' mean of the other video's [place; u] ) ), b_j likewise,
                 where place_i are the six bounds of the cell of u_i along time, rows and columns
           plan = Sinkhorn( C + PLACE_COST * |place_i - place_j|^2, a, b )
    score = -SCORE_SCALE * mean over the scales of sum_ij plan_ij C_ij;  loss: softmax cross-entropy of the scores

No text is used, and queries do not see each other.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, C candidates of a video or class,
D width of the maps, d reduced width, M = d (d + 1) / 2 (of d + 3 where the position channels are on).
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from models import register
from models.backbones import FrameEncoderOptions, frame_encoder
from models.base import FewShotModel
from models.explanation import Explanation, Measure, shares
from models.moments import bounds, cells, normalised_square_root, second_moment, sinkhorn, upper_triangle, windows

Scales = list[Annotated[int, Field(ge=1)]]

# Added to the diagonal of every moment: a cell whose positions are all alike has no covariance, whose trace and root
# could not be divided by and differentiated. The features that it meets are batch-normalised, of variance about 1.
RIDGE = 1e-3
BOUNDS = 6  # numbers that locate a candidate in the video; the number of its scale comes before them


class A2m2Options(FrameEncoderOptions):
    """The `MODEL` section of A2M2-Net. No default is the paper's; those of TCP and iSQRT-COV are said to be so."""

    MAP_SIZE: int = Field(7, ge=1, description="larger feature maps are averaged down to this many rows and columns")
    REDUCED_WIDTH: int = Field(64, ge=2, description="features after the 1x1 convolution (TCP: 128)")
    CENTRED: bool = Field(True, description="moments about the mean (covariance, as TCP); off: about zero")
    POSITION_WEIGHT: float = Field(
        0.0, ge=0, description="ours: size of three more channels, the row, column and time of a position; 0: none"
    )
    MULTI_SCALE: bool = Field(True, description="M2 at all scales; off: at the finest of each list alone")
    TEMPORAL_SCALES: Scales = Field([1, 2, 4, 8], min_length=1, description="windows that the frames are cut into")
    SPATIAL_SCALES: Scales = Field([1, 2], min_length=1, description="regions that rows, and columns, are cut into")
    NEWTON_ITERATIONS: int = Field(3, ge=1, description="of the matrix square root (iSQRT-COV: 3 to 5)")
    ADAPTIVE: bool = Field(
        True,
        description="A2; off: candidates of the same window and region are compared, all of a scale weighted alike",
    )
    METRIC: Literal["optimal-transport", "bi-mhm", "mean"] = Field(
        "optimal-transport", description="how A2 pairs candidates: by a plan, each with its nearest, all with all"
    )
    GUIDANCE_HIDDEN: int = Field(64, ge=1, description="hidden width of the network that weighs candidates")
    PLACE_COST: float = Field(
        0.0, ge=0, description="ours: what optimal transport pays for pairs of cells apart in time or place; 0: nothing"
    )
    SINKHORN_EPSILON: float = Field(0.05, gt=0, description="entropy of the transport plan, in units of the cost")
    SINKHORN_ITERATIONS: int = Field(20, ge=1, description="scalings of the transport plan")
    SCORE_SCALE: float = Field(50.0, gt=0, description="factor on the scores: 1 / temperature of the softmax")


class M2Block(nn.Module):
    """Multi-scale second-order moments: one descriptor for each window of time and region of the map."""

    def __init__(self, width: int, options: A2m2Options) -> None:
        super().__init__()
        self.options = options
        size = options.REDUCED_WIDTH + (3 if options.POSITION_WEIGHT else 0)
        self.width = BOUNDS + size * (size + 1) // 2
        self.reduce = nn.Sequential(
            nn.Conv2d(width, options.REDUCED_WIDTH, kernel_size=1, bias=False),
            nn.BatchNorm2d(options.REDUCED_WIDTH),
            nn.ReLU(),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Candidates of each video on its own: float [V, T, h, w, D] -> float32 [V, C, 1 + BOUNDS + M].

        C depends on T, h and w, since a scale has at most one window for each frame and one region for each position.
        A candidate is the number of its scale, the bounds of its cell, as shares of the video and the map, and then its
        descriptor. Scales and bounds are the same for all videos.
        """
        features = self._with_positions(self._reduced(maps))
        shape, centred = features.shape[1:4], self.options.CENTRED
        chosen = cells(shape, *self._scales())
        moments = torch.stack(
            [second_moment(features[:, t, y, x].flatten(1, 3), centred) for _, (t, y, x) in chosen], dim=1
        )
        moments = moments + RIDGE * torch.eye(moments.shape[-1], device=moments.device)
        descriptors = upper_triangle(normalised_square_root(moments, self.options.NEWTON_ITERATIONS))
        scales_and_bounds = torch.tensor([[scale, *bounds(cell, shape)] for scale, cell in chosen])
        scales_and_bounds = scales_and_bounds.to(descriptors.device, non_blocking=True)
        return torch.cat([scales_and_bounds.expand(len(descriptors), -1, -1), descriptors], dim=-1)

    def _scales(self) -> tuple[Scales, Scales]:
        temporal, spatial = self.options.TEMPORAL_SCALES, self.options.SPATIAL_SCALES
        return (temporal, spatial) if self.options.MULTI_SCALE else ([max(temporal)], [max(spatial)])

    def _reduced(self, maps: Tensor) -> Tensor:
        """Maps of at most MAP_SIZE x MAP_SIZE positions after the 1x1 convolution, float32 [V, T, h, w, d]."""
        images = rearrange(_averaged_down(maps, self.options.MAP_SIZE), "v t h w d -> (v t) d h w")
        reduced = self.reduce(images).float()
        return rearrange(reduced, "(v t) d h w -> v t h w d", v=maps.shape[0])

    def _with_positions(self, features: Tensor) -> Tensor:
        """[V, T, h, w, d] -> [V, T, h, w, d + 3], the time, row and column of a position between -1 and 1.

        A moment does not know where in its cell a feature was; its products with these channels do.
        """
        weight = self.options.POSITION_WEIGHT
        if not weight:
            return features
        axes = [_line(length, features.device) for length in features.shape[1:4]]
        positions = weight * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        return torch.cat([features, positions.expand(*features.shape[:-1], 3)], dim=-1)


class A2Module(nn.Module):
    """Adaptive alignment: which candidates count in the comparison of two videos, and which are compared.

    `own` is W and c, `other` W' and `weigh` w; their input is a candidate with its place, [place_i; u_i]. The cost of a
    pair compares descriptors only. Each scale is aligned separately and counts equally: in one set of all candidates
    the finest scale would dominate by its number, and fine candidates would be paired with coarse ones, which resemble
    everything.
    """

    def __init__(self, width: int, options: A2m2Options) -> None:
        super().__init__()
        self.options = options
        self.own = nn.Linear(width, options.GUIDANCE_HIDDEN)
        self.other = nn.Linear(width, options.GUIDANCE_HIDDEN, bias=False)
        self.weigh = nn.Linear(options.GUIDANCE_HIDDEN, 1, bias=False)

    def forward(self, query: Tensor, prototypes: Tensor, cost: Tensor, same_scale: Tensor) -> Tensor:
        """Distances of all queries to all classes, added up over the scales.

        Args:
            query: candidates, float32 [B, Q, C, 1 + BOUNDS + M].
            prototypes: float32 [B, N, C, 1 + BOUNDS + M].
            cost: of pairing a candidate of the query with one of the class, float32 [B, Q, N, C, C].
            same_scale: which pairs are of one scale, bool [C, C].

        Returns:
            float32 [B, Q, N].
        """
        options = self.options
        if options.METRIC == "optimal-transport":  # place influences the pairs but is not part of the distance
            return (self.plan(query, prototypes, cost, same_scale) * cost).sum(dim=(-2, -1))
        log_rows, log_columns = self.log_weights(query, prototypes, same_scale)
        if options.METRIC == "mean":
            return torch.einsum("bqnc,bqncs,bqns->bqn", log_rows.exp(), cost * same_scale, log_columns.exp())
        within = cost.masked_fill(~same_scale, torch.inf)
        to_nearest = (log_rows.exp() * within.amin(dim=-1)).sum(dim=-1)
        return (to_nearest + (log_columns.exp() * within.amin(dim=-2)).sum(dim=-1)) / 2

    def plan(self, query: Tensor, prototypes: Tensor, cost: Tensor, same_scale: Tensor) -> Tensor:
        """The transport plan, float32 [B, Q, N, C, C]; the arguments are those of `forward`."""
        options, total = self.options, cost.masked_fill(~same_scale, torch.inf)
        if options.PLACE_COST:
            total = total + options.PLACE_COST * _apart(query[0, 0])
        masses = self.log_weights(query, prototypes, same_scale)
        return sinkhorn(total, *masses, options.SINKHORN_EPSILON, options.SINKHORN_ITERATIONS)

    def log_weights(self, query: Tensor, prototypes: Tensor, same_scale: Tensor) -> tuple[Tensor, Tensor]:
        """log a_i and log b_j, float32 [B, Q, N, C] each; the arguments are those of `forward`."""
        of_classes = self._log_weights(prototypes, query, same_scale).transpose(1, 2)
        return self._log_weights(query, prototypes, same_scale), of_classes

    def _log_weights(self, candidates: Tensor, others: Tensor, same_scale: Tensor) -> Tensor:
        """log a_i, the softmax over a scale, guided by the mean of that scale in the other video.

        Args:
            candidates: float32 [B, X, C, 1 + BOUNDS + M].
            others: of the other videos, float32 [B, Y, C, 1 + BOUNDS + M].
            same_scale: bool [C, C].

        Returns:
            float32 [B, X, Y, C].
        """
        share = same_scale / same_scale.sum(dim=-1, keepdim=True)
        own, guide = self.own(candidates[..., 1:]).unsqueeze(2), self.other(share @ others[..., 1:]).unsqueeze(1)
        weights = self.weigh(F.relu(own + guide)).squeeze(-1)
        of_scale = weights.unsqueeze(-2).masked_fill(~same_scale, -torch.inf)
        return weights - of_scale.logsumexp(dim=-1)


def _averaged_down(maps: Tensor, most: int) -> Tensor:
    """Maps of at most `most` rows and columns: float [V, T, H, W, D] -> the same type, [V, T, h, w, D].

    Adaptive average pooling as two products with constant matrices, in float32: the gradient of PyTorch's own has no
    deterministic form on a GPU.
    """
    height, width = maps.shape[2:4]
    if max(height, width) <= most:
        return maps
    rows, columns = (_averages(side, min(side, most)).to(maps.device, non_blocking=True) for side in (height, width))
    with torch.autocast(maps.device.type, enabled=False):
        of_rows = (rows @ maps.float().flatten(3)).unflatten(3, (width, -1))
        return (columns @ of_rows).to(maps.dtype)


def _averages(length: int, parts: int) -> Tensor:
    """The matrix whose product is the mean of each window of an axis: float32 [parts, length]."""
    matrix = torch.zeros(parts, length)
    for row, window in zip(matrix, windows(length, parts), strict=True):
        row[window] = 1 / (window.stop - window.start)
    return matrix


def _apart(candidates: Tensor) -> Tensor:
    """Squared distance of the bounds of two cells, which all videos share: [C, 1 + BOUNDS + M] -> [C, C]."""
    bounds_of_cells = candidates[:, 1 : 1 + BOUNDS]
    return (bounds_of_cells[:, None] - bounds_of_cells).square().sum(dim=-1)


def _line(length: int, device: torch.device) -> Tensor:
    """The middles of `length` equal parts of [-1, 1]."""
    return (2 * torch.arange(length, device=device) + 1) / length - 1


@register("a2m2")
class A2m2(FewShotModel):
    """The reconstructed A2M2-Net; either of its parts can be replaced by its fixed counterpart."""

    Options = A2m2Options

    def __init__(self, options: A2m2Options, image_size: int) -> None:
        super().__init__()
        self.options = options
        self.encoder = frame_encoder(options, image_size)
        self.pixel_mean, self.pixel_std = self.encoder.pixel_mean, self.encoder.pixel_std
        # M2 replaces what a backbone has behind its maps (attention pool, projection).
        self.M2 = M2Block(self.encoder.drop_pooling(), options)
        self.A2 = A2Module(self.M2.width, options) if options.ADAPTIVE else None

    def encode(self, frames: Tensor) -> Tensor:
        """The candidates of each video: float [V, T, 3, H, W] -> float32 [V, C, 1 + BOUNDS + M].

        They take the place of frames, C for T; only `match` reads that axis. The moments depend on one video alone and
        are computed here, so that a test run computes them once per video.
        """
        return self.encode_features(self.backbone_features(frames))

    def backbone_features(self, frames: Tensor) -> Tensor:
        """The backbone's maps of each frame: float [V, T, 3, H, W] -> float [V, T, h, w, D]."""
        return self.encoder.feature_maps(frames)

    def encode_features(self, features: Tensor) -> Tensor:
        """The candidates from the maps: float [V, T, h, w, D] -> float32 [V, C, 1 + BOUNDS + M]."""
        return self.M2(features)

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Scores of the queries, each compared with the mean over the shots of every class's candidates.

        Args:
            support: float [B, N, K, C, 1 + BOUNDS + M].
            query: float [B, Q, C, 1 + BOUNDS + M].
            class_text: float [B, N, 1], not used.

        Returns:
            float32 [B, Q, N].
        """
        with torch.autocast(query.device.type, enabled=False):
            query, prototypes, cost, same_scale = _compared(query, support)
            number_of_scales = (1 / same_scale.sum(dim=-1)).sum()
            return -self.options.SCORE_SCALE * self._distances(query, prototypes, cost, same_scale) / number_of_scales

    def _distances(self, query: Tensor, prototypes: Tensor, cost: Tensor, same_scale: Tensor) -> Tensor:
        """What A2 makes of the costs, or what replaces it; see `A2Module.forward`."""
        return self.A2(query, prototypes, cost, same_scale) if self.A2 else _fixed(cost, same_scale)

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """The pairing of the finest windows of time, the queries' descriptors, and what scales and candidates count.

        A pair of candidates counts evenly for all pairs of windows that they cover.
        """
        query, prototypes, cost, same_scale = _compared(query, support)
        if self.A2 and self.options.METRIC == "optimal-transport":
            plan = self.A2.plan(query, prototypes, cost, same_scale)
        else:
            plan = shares(lambda chosen: self._distances(query, prototypes, chosen, same_scale), cost)
        parts, times = _scale_names(query[0, 0]), _covered_times(query[0, 0])
        pairing = torch.einsum("bqncs,ct,su->bqntu", plan, times, times)
        of_scales = (plan * cost).sum(dim=-1) @ _members(parts).to(cost)
        names, meaning = tuple(dict.fromkeys(parts)), "Share of each scale (windows of time x regions) in the distance."
        share = of_scales / of_scales.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        measures = {"scales": Measure(share, meaning, "part", names)}
        if self.A2:
            weights = self.A2.log_weights(query, prototypes, same_scale)[0].exp() * same_scale.sum(dim=-1)
            meaning = "Weight of each candidate of the query; 1 where all candidates of its scale count alike."
            measures["candidates"] = Measure(weights, meaning, "part", parts)
        return Explanation({"candidates by time": pairing}, {"moments": query[..., 1 + BOUNDS :]}, measures)


def _compared(query: Tensor, support: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `A2Module.forward` takes: queries, prototypes, the cost of each pair and which pairs are of one scale."""
    query, prototypes = query.float(), support.float().mean(dim=2)
    cost = 1 - torch.einsum("bqcm,bnsm->bqncs", _directions(query), _directions(prototypes))
    scales = query[0, 0, :, 0]  # the same for all videos
    return query, prototypes, cost, scales[:, None] == scales


def _scale_names(candidates: Tensor) -> tuple[str, ...]:
    """The scale of each candidate, `windows x regions`: [C, 1 + BOUNDS + M] -> C names."""
    scales = candidates[:, 0].tolist()
    places = {scale: candidates[candidates[:, 0] == scale, 1 : 1 + BOUNDS] for scale in scales}
    counts = {scale: len(of_scale[:, :2].unique(dim=0)) for scale, of_scale in places.items()}
    return tuple(f"{counts[scale]}x{len(places[scale]) // counts[scale]}" for scale in scales)


def _members(parts: tuple[str, ...]) -> Tensor:
    """Which of C candidates belong to each scale, float [C, scales]."""
    names = list(dict.fromkeys(parts))
    return F.one_hot(torch.tensor([names.index(part) for part in parts])).float()


def _covered_times(candidates: Tensor) -> Tensor:
    """How each candidate is spread over the finest windows of time: [C, 1 + BOUNDS + M] -> [C, windows]."""
    begin, end = candidates[:, 1], candidates[:, 2]
    finest = int((1 / (end - begin)).max().round())
    middles = (torch.arange(finest, device=candidates.device) + 0.5) / finest
    covered = ((begin[:, None] <= middles) & (middles <= end[:, None])).float()
    return covered / covered.sum(dim=-1, keepdim=True)


def _directions(candidates: Tensor) -> Tensor:
    """Descriptors of length one, without scale and bounds: [..., 1 + BOUNDS + M] -> [..., M]."""
    return F.normalize(candidates[..., 1 + BOUNDS :], dim=-1)


def _fixed(cost: Tensor, same_scale: Tensor) -> Tensor:
    """The fixed alignment that A2 replaces: pairs of the same window and region, averaged in each scale, then summed.

    cost float32 [..., C, C], same_scale bool [C, C] -> float32 [...].
    """
    return (cost.diagonal(dim1=-2, dim2=-1) / same_scale.sum(dim=-1)).sum(dim=-1)
