"""A2M2-Net: adaptively aligned multi-scale second-order moments (arXiv 2509.17638, IJCV). A RECONSTRUCTION.

Neither the paper's equations nor its code could be obtained, only its abstract and second-hand summaries. This file
rebuilds what they describe, second-order descriptors at several spatio-temporal scales and candidates that are selected
and aligned instance by instance through optimal transport, from published parts: the covariance pooling of the first
author's TCP (NeurIPS 2021) with the matrix square root of iSQRT-COV (CVPR 2018), and DeepEMD's transport between two
weighted sets (CVPR 2020). Options marked "ours" are additions. No default value is from the paper.

    frames -> backbone -> maps [T, h, w, D] -> 1x1 convolution -> x [T, h, w, d]
      M2   for every window of time and region of the map, at every scale: the moment P = mean of x x^T,
           u = upper triangle of sqrt( P / trace P )
      A2   at every scale: C_ij = 1 - cos(u_i of the query, u_j of the class)
           a_i = softmax_i( w relu( W [place_i; u_i] + c + W' mean of the other video's [place; u] + W" t ) ), b_j
                 likewise; place_i: the six bounds of the cell of u_i along time, rows and columns; t: the class's text
                 (without TEXT_GUIDANCE no such term)
           plan = Sinkhorn( C + PLACE_COST * |place_i - place_j|^2, a, b )
    score = SCORE_SCALE * ( TEXT_WEIGHT * cos(v, t) - mean over the scales of sum_ij plan_ij C_ij ),
            v = L (mean of the query's maps), L: the tower's own pooling at first;  loss: softmax cross-entropy

The paper combines visual and textual modalities, but how is not known. Both text terms are ours and off by default.
Queries do not see each other. Only candidates of the same scale are compared.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, C candidates of a video or class,
D width of the maps, d reduced width, M = d (d + 1) / 2 (of d + 3 where the position channels are on).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from models import a2m2_explanation, register
from models.backbones import FrameEncoderOptions, frame_encoder
from models.base import FewShotModel
from models.explanation import Explanation
from models.matching import cosine_distances
from models.moments import bounds, cells, normalised_square_root, second_moment, sinkhorn, upper_triangle, windows
from models.sentences import ClassSentences, TextOptions
from models.text import TemplateSet

Scales = list[Annotated[int, Field(ge=1)]]

# Added to the diagonal of every moment. In a cell of equal positions the covariance is zero, so its trace cannot divide
# and its root has no gradient. The features are batch-normalised, with a variance of about 1.
RIDGE = 1e-3
BOUNDS = 6  # numbers that locate a candidate in the video; the number of its scale comes before them


class A2m2Options(FrameEncoderOptions, TextOptions):
    """The `MODEL` section of A2M2-Net; descriptions name the values of TCP and iSQRT-COV."""

    MAP_SIZE: int = Field(7, ge=1, description="larger feature maps are averaged down to this many rows and columns")
    REDUCED_WIDTH: int = Field(64, ge=2, description="features after the 1x1 convolution (TCP: 128)")
    CENTRED: bool = Field(True, description="moments about the mean (covariance, as in TCP); off: about zero")
    POSITION_WEIGHT: float = Field(
        0.0, ge=0, description="ours: size of three added channels, the time, row and column of a position; 0: none"
    )
    MULTI_SCALE: bool = Field(True, description="M2 at all scales; off: only at the finest of each list")
    TEMPORAL_SCALES: Scales = Field(
        [1, 2, 4, 8], min_length=1, description="numbers of windows that the frames are cut into"
    )
    SPATIAL_SCALES: Scales = Field(
        [1, 2], min_length=1, description="numbers of regions that rows, and columns, are cut into"
    )
    NEWTON_ITERATIONS: int = Field(3, ge=1, description="iterations of the matrix square root (iSQRT-COV: 3 to 5)")
    ADAPTIVE: bool = Field(
        True,
        description="A2; off: candidates of the same window and region are compared, with equal weights",
    )
    METRIC: Literal["optimal-transport", "bi-mhm", "mean"] = Field(
        "optimal-transport", description="how A2 pairs candidates: by a plan, each with its nearest, all with all"
    )
    GUIDANCE_HIDDEN: int = Field(64, ge=1, description="hidden width of the network that weighs candidates")
    PLACE_COST: float = Field(
        0.0, ge=0, description="ours: cost, in the optimal transport, of pairing cells that are apart in time or place"
    )
    SINKHORN_EPSILON: float = Field(0.05, gt=0, description="entropy of the transport plan, in units of the cost")
    SINKHORN_ITERATIONS: int = Field(20, ge=1, description="scalings of the rows and columns of the plan")
    TEXT_WEIGHT: float = Field(
        0.0, ge=0, description="ours: weight of the cosine of a query and the class text in the score; 0: no text"
    )
    TEXT_GUIDANCE: bool = Field(
        False, description="ours: the class text also determines the weights of the candidates of A2"
    )
    TEXT_TEMPLATES: TemplateSet = Field("photo", description="sentences averaged into a class text")
    SCORE_SCALE: float = Field(50.0, gt=0, description="factor on the scores: 1 / temperature of the softmax")

    @model_validator(mode="after")
    def _check_guidance(self) -> "A2m2Options":
        if self.TEXT_GUIDANCE and not self.ADAPTIVE:
            raise ValueError(
                "MODEL.TEXT_GUIDANCE is true but MODEL.ADAPTIVE is false, so candidates have no weights: set "
                "MODEL.ADAPTIVE to true or MODEL.TEXT_GUIDANCE to false."
            )
        return self


class M2Block(nn.Module):
    """Multi-scale second-order moments: one descriptor for each time window and region of the map."""

    def __init__(self, width: int, options: A2m2Options) -> None:
        super().__init__()
        self.options = options
        size = options.REDUCED_WIDTH + (3 if options.POSITION_WEIGHT else 0)
        self.descriptor_width = size * (size + 1) // 2
        self.width = BOUNDS + self.descriptor_width
        self.reduce = nn.Sequential(
            nn.Conv2d(width, options.REDUCED_WIDTH, kernel_size=1, bias=False),
            nn.BatchNorm2d(options.REDUCED_WIDTH),
            nn.ReLU(),
        )
        # C -> number of candidates at each scale, stored so that `match` does not have to read it from the device.
        self.sizes_of_scales: dict[int, list[int]] = {}

    def forward(self, maps: Tensor) -> Tensor:
        """Computes the candidates of each video: float [V, T, h, w, D] -> float32 [V, C, 1 + BOUNDS + M].

        C depends on T, h and w: a scale has at most one window per frame and one region per position.
        A candidate contains the number of its scale, the bounds of its cell as fractions of the video and the map, and
        its descriptor. Scales and bounds are the same for all videos.
        """
        features = self._with_positions(self._reduced(maps))
        shape, centred = features.shape[1:4], self.options.CENTRED
        chosen = cells(shape, *self._scales())
        self.sizes_of_scales[len(chosen)] = list(Counter(scale for scale, _ in chosen).values())
        moments = torch.stack(
            [second_moment(features[:, t, y, x].flatten(1, 3), centred) for _, (t, y, x) in chosen], dim=1
        )
        moments = moments + RIDGE * torch.eye(moments.shape[-1], device=moments.device)
        descriptors = upper_triangle(normalised_square_root(moments, self.options.NEWTON_ITERATIONS))
        scales_and_bounds = torch.tensor([[scale, *bounds(cell, shape)] for scale, cell in chosen])
        scales_and_bounds = scales_and_bounds.to(descriptors.device, non_blocking=True)
        return torch.cat([scales_and_bounds.expand(descriptors.shape[0], -1, -1), descriptors], dim=-1)

    def _scales(self) -> tuple[Scales, Scales]:
        temporal, spatial = self.options.TEMPORAL_SCALES, self.options.SPATIAL_SCALES
        return (temporal, spatial) if self.options.MULTI_SCALE else ([max(temporal)], [max(spatial)])

    def _reduced(self, maps: Tensor) -> Tensor:
        """Returns maps of at most MAP_SIZE x MAP_SIZE positions after the 1x1 convolution, float32 [V, T, h, w, d]."""
        images = rearrange(_average_down(maps, self.options.MAP_SIZE), "v t h w d -> (v t) d h w")
        reduced = self.reduce(images).float()
        return rearrange(reduced, "(v t) d h w -> v t h w d", v=maps.shape[0])

    def _with_positions(self, features: Tensor) -> Tensor:
        """Appends the time, row and column of each position, between -1 and 1: [V, T, h, w, d] -> [V, T, h, w, d + 3].

        A moment does not show where in its cell a feature was; its products with these channels do.
        """
        weight = self.options.POSITION_WEIGHT
        if not weight:
            return features
        axes = [_line(length, features.device) for length in features.shape[1:4]]
        positions = weight * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        return torch.cat([features, positions.expand(*features.shape[:-1], 3)], dim=-1)


class A2Module(nn.Module):
    """Adaptive alignment: weights of the candidates of two videos, and their pairing.

    `own` is W and c, `other` W' and `weigh` w; their input is a candidate with its place, [place_i; u_i]. The cost of a
    pair compares descriptors only. Each scale is aligned separately and counts equally. In a joint set the finest scale
    would dominate by its number of candidates, and fine candidates would be paired with coarse ones, which resemble
    everything.
    """

    def __init__(self, width: int, text_width: int, options: A2m2Options) -> None:
        super().__init__()
        self.options = options
        self.own = nn.Linear(width, options.GUIDANCE_HIDDEN)
        self.other = nn.Linear(width, options.GUIDANCE_HIDDEN, bias=False)
        self.weigh = nn.Linear(options.GUIDANCE_HIDDEN, 1, bias=False)
        self.text = nn.Linear(text_width, options.GUIDANCE_HIDDEN, bias=False) if options.TEXT_GUIDANCE else None

    def forward(self, query: Tensor, prototypes: Tensor, cost: Tensor, class_text: Tensor) -> Tensor:
        """Computes the distances of all queries to all classes at one scale.

        Args:
            query: the candidates of the scale, float32 [B, Q, C, 1 + BOUNDS + M].
            prototypes: float32 [B, N, C, 1 + BOUNDS + M].
            cost: cost of pairing a candidate of the query with one of the class, float32 [B, Q, N, C, C].
            class_text: float32 [B, N, D], used only if the text guides the weights.

        Returns:
            float32 [B, Q, N].
        """
        options = self.options
        if options.METRIC == "optimal-transport":  # place influences the pairs but is not part of the distance
            return (self.plan(query, prototypes, cost, class_text) * cost).sum(dim=(-2, -1))
        log_rows, log_columns = self.log_weights(query, prototypes, class_text)
        if options.METRIC == "mean":
            return torch.einsum("bqnc,bqncs,bqns->bqn", log_rows.exp(), cost, log_columns.exp())
        to_nearest = (log_rows.exp() * cost.amin(dim=-1)).sum(dim=-1)
        return (to_nearest + (log_columns.exp() * cost.amin(dim=-2)).sum(dim=-1)) / 2

    def plan(self, query: Tensor, prototypes: Tensor, cost: Tensor, class_text: Tensor) -> Tensor:
        """Returns the transport plan, float32 [B, Q, N, C, C]; the arguments are those of `forward`."""
        options = self.options
        total = cost + options.PLACE_COST * _squared_distances(query[0, 0]) if options.PLACE_COST else cost
        masses = self.log_weights(query, prototypes, class_text)
        return sinkhorn(total, *masses, options.SINKHORN_EPSILON, options.SINKHORN_ITERATIONS)

    def log_weights(self, query: Tensor, prototypes: Tensor, class_text: Tensor) -> tuple[Tensor, Tensor]:
        """Computes log a_i and log b_j, float32 [B, Q, N, C] each; the arguments are those of `forward`."""
        text = rearrange(self.text(class_text), "b n g -> b 1 n 1 g") if self.text else None
        class_weights = self._log_weights(prototypes, query, None if text is None else text.transpose(1, 2))
        return self._log_weights(query, prototypes, text), class_weights.transpose(1, 2)

    def _log_weights(self, candidates: Tensor, others: Tensor, text: Tensor | None) -> Tensor:
        """Computes log a_i, the softmax over the candidates, guided by the mean candidate of the other video.

        Args:
            candidates: float32 [B, X, C, 1 + BOUNDS + M].
            others: candidates of the other videos, float32 [B, Y, C, 1 + BOUNDS + M].
            text: float32 [B, 1, Y, 1, GUIDANCE_HIDDEN], or with X and Y exchanged.

        Returns:
            float32 [B, X, Y, C].
        """
        own, mean = self.own(candidates[..., 1:]), others[..., 1:].mean(dim=2, keepdim=True)
        guided = own.unsqueeze(2) + self.other(mean).unsqueeze(1)
        hidden = guided if text is None else guided + text
        return self.weigh(F.relu(hidden)).squeeze(-1).log_softmax(dim=-1)


def _average_down(maps: Tensor, limit: int) -> Tensor:
    """Reduces maps to at most `limit` rows and columns: float [V, T, H, W, D] -> the same type, [V, T, h, w, D].

    This is adaptive average pooling, computed as two products with constant matrices in float32, since the gradient of
    PyTorch's implementation is not deterministic on a GPU.
    """
    height, width = maps.shape[2:4]
    if max(height, width) <= limit:
        return maps
    rows, columns = (
        _averaging_matrix(side, min(side, limit)).to(maps.device, non_blocking=True) for side in (height, width)
    )
    with torch.autocast(maps.device.type, enabled=False):
        row_means = (rows @ maps.float().flatten(3)).unflatten(3, (width, -1))
        return (columns @ row_means).to(maps.dtype)


def _averaging_matrix(length: int, parts: int) -> Tensor:
    """Builds the matrix that averages each window of an axis: float32 [parts, length]."""
    matrix = torch.zeros(parts, length)
    for row, window in zip(matrix, windows(length, parts), strict=True):
        row[window] = 1 / (window.stop - window.start)
    return matrix


def _squared_distances(candidates: Tensor) -> Tensor:
    """Computes squared distances of the bounds of cells, which all videos share: [C, 1 + BOUNDS + M] -> [C, C]."""
    bounds_of_cells = candidates[:, 1 : 1 + BOUNDS]
    return (bounds_of_cells[:, None] - bounds_of_cells).square().sum(dim=-1)


def _line(length: int, device: torch.device) -> Tensor:
    """Returns the midpoints of `length` equal parts of [-1, 1]."""
    return (2 * torch.arange(length, device=device) + 1) / length - 1


@register("a2m2")
class A2m2(FewShotModel):
    """The reconstructed A2M2-Net; M2 and A2 can each be replaced by a fixed counterpart."""

    Options = A2m2Options

    def __init__(self, options: A2m2Options, image_size: int) -> None:
        super().__init__()
        self.options = options
        uses_text = bool(options.TEXT_WEIGHT or options.TEXT_GUIDANCE)
        encoder: Any = frame_encoder(options, image_size, with_text=uses_text)
        self.encoder, self.uses_text = encoder, uses_text
        self.sentences = ClassSentences(options)
        self.pixel_mean, self.pixel_std = encoder.pixel_mean, encoder.pixel_std
        self.to_text: nn.Linear | None = encoder.text_projection() if options.TEXT_WEIGHT else None
        # M2 replaces the layers of a backbone after its maps (attention pool, projection).
        self.M2 = M2Block(encoder.drop_pooling(), options)
        self.A2 = A2Module(self.M2.width, encoder.width, options) if options.ADAPTIVE else None

    def encode(self, frames: Tensor) -> Tensor:
        """Computes the candidates of each video: float [V, T, 3, H, W] -> float32 [V, C, 1 + BOUNDS + M].

        The axis of C candidates replaces that of T frames. The moments depend on only one video and are computed here,
        so that a test run computes them once per video. If the video-text score is on, further rows contain the
        video's feature v, see `_pack`.
        """
        return self.encode_features(self.backbone_features(frames))

    def backbone_features(self, frames: Tensor) -> Tensor:
        """Returns the backbone's maps of each frame: float [V, T, 3, H, W] -> float [V, T, h, w, D]."""
        return self.encoder.feature_maps(frames)

    def encode_features(self, features: Tensor) -> Tensor:
        """Computes the candidates from the maps: float [V, T, h, w, D] -> float32 [V, C, 1 + BOUNDS + M]."""
        candidates = self.M2(features)
        if self.to_text is None:
            return candidates
        video = self.to_text(features.mean(dim=(1, 2, 3))).float()
        return torch.cat([candidates, _pack(video, candidates.shape[-1])], dim=1)

    def class_text(self, prompt_names: Sequence[str]) -> Tensor:
        """Returns CLIP's text features, float32 [C, D], if a text option is on; else zeros, float32 [C, 1]."""
        if not self.uses_text:
            return super().class_text(prompt_names)
        return self.encoder.class_text(self.sentences, prompt_names)

    def text_source(self, prompt_names: Sequence[str]) -> tuple[list[Tensor], dict[str, Any]] | None:
        """Returns the text tower's weights and the sentences if a text option is on."""
        return self.encoder.text_source(self.sentences, prompt_names) if self.uses_text else None

    def cut_prompts(self, prompt_names: Sequence[str]) -> list[bool]:
        """Returns for each of C classes whether a sentence is longer than the text tower reads."""
        if not self.uses_text:
            return super().cut_prompts(prompt_names)
        return self.encoder.cut_prompts(self.sentences, prompt_names)

    def drop_text_tower(self) -> None:
        """Frees CLIP's text tower."""
        if self.uses_text:
            self.encoder.drop_text_tower()

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Scores each query against the mean over the shots of every class's candidates.

        Args:
            support: float [B, N, K, C, 1 + BOUNDS + M].
            query: float [B, Q, C, 1 + BOUNDS + M].
            class_text: float [B, N, D], used only if a text option is on.

        Returns:
            float32 [B, Q, N].
        """
        with torch.autocast(query.device.type, enabled=False):
            distances = [self.distances(*pair, class_text.float()) for pair in self.pairs(support, query)]
            score = -self.options.SCORE_SCALE * torch.stack(distances).mean(dim=0)
            if self.to_text is None:
                return score
            video = _unpack(query.float()[:, :, -self._rows_of_text() :], self.encoder.width)
            similarity = 1 - cosine_distances(video, class_text)
            return score + self.options.SCORE_SCALE * self.options.TEXT_WEIGHT * similarity

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """Returns the pairing of the finest time windows, the queries' descriptors, and candidate weights."""
        return a2m2_explanation.explain(self, support, query, class_text)

    def pairs(self, support: Tensor, query: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Returns queries, prototypes and the cost of each pair of candidates, scale by scale.

        Args:
            support: float [B, N, K, C, 1 + BOUNDS + M].
            query: float [B, Q, C, 1 + BOUNDS + M].

        Returns:
            for each scale: float32 [B, Q, c, 1 + BOUNDS + M], [B, N, c, 1 + BOUNDS + M], [B, Q, N, c, c].
        """
        end = query.shape[2] - self._rows_of_text()
        query, prototypes = query[:, :, :end].float(), support[:, :, :, :end].float().mean(dim=2)
        # The candidates of a scale are consecutive, and their number is the same for all videos.
        sizes = self.M2.sizes_of_scales.get(end)
        if sizes is None:  # candidates that another model computed
            sizes = query[0, 0, :, 0].unique_consecutive(return_counts=True)[1].tolist()
        return [
            (q, p, 1 - torch.einsum("bqcm,bnsm->bqncs", _directions(q), _directions(p)))
            for q, p in zip(query.split(sizes, dim=2), prototypes.split(sizes, dim=2), strict=True)
        ]

    def distances(self, query: Tensor, prototypes: Tensor, cost: Tensor, class_text: Tensor) -> Tensor:
        """Computes A2's distances from the costs of one scale, see `A2Module.forward`.

        Without A2, this is the mean distance between candidates of the same window and region.
        """
        if self.A2:
            return self.A2(query, prototypes, cost, class_text)
        return cost.diagonal(dim1=-2, dim2=-1).mean(dim=-1)

    def _rows_of_text(self) -> int:
        """Returns the number of rows after the candidates that contain the video's feature v."""
        return 0 if self.to_text is None else -(-self.encoder.width // (1 + self.M2.width))


def _pack(video: Tensor, width: int) -> Tensor:
    """Packs a feature of each video as rows of candidates: [V, D] -> [V, R, width], with zeros after the D numbers."""
    return F.pad(video, (0, -video.shape[-1] % width)).unflatten(-1, (-1, width))


def _unpack(rows: Tensor, width: int) -> Tensor:
    """Inverts `_pack`: [..., R, 1 + BOUNDS + M] -> [..., D]."""
    return rows.flatten(-2)[..., :width]


def _directions(candidates: Tensor) -> Tensor:
    """Returns descriptors of unit length, without scale and bounds: [..., 1 + BOUNDS + M] -> [..., M]."""
    return F.normalize(candidates[..., 1 + BOUNDS :], dim=-1)
