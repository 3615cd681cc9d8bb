"""TRX: temporal-relational CrossTransformers for few-shot action recognition (Perrett et al., CVPR 2021).

    frames -> image network -> f [T, D];   x = f + pos, sinusoids of size 0.1
    for tuples of m frames, m = 2 and 3:    x_p = [x_t1; ...; x_tm] of all t1 < ... < tm    P_2 = 28, P_3 = 56 for T = 8
      k_p = LayerNorm(W_k x_p + b),   v_p = W_v x_p                                        both of width d = 1152
      a_pr = softmax_r( k_p of the query . k_r of the class / sqrt(d) )     r: the tuples of all shots of the class
      D_m  = 1/P_m sum_p || v_p of the query - sum_r a_pr v_r of the class ||^2
    score = -(mean over m of D_m);  loss: softmax cross-entropy of the scores

Every class has a separate prototype for each tuple of a query. Keys and values depend on one video, so they are
precomputed, and tuples are never built (`models.layers.TupleLinear`). No text is used; queries do not see each other.

Where the release (github.com/tobyperrett/trx) differs: it has a bias in W_v, which cancels in D, and a LayerNorm for
values that it never applies; neither exists here. It sums the cross-entropy over the queries; here it is the mean.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, P tuples, D width of frames, d of keys and values.
"""

import math
from collections.abc import Sequence
from itertools import count
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from models import register
from models.adapters import AdapterChoice
from models.backbones import FrameEncoderOptions, FrameMethod
from models.explanation import Explanation
from models.layers import TupleLinear, frame_tuples, sinusoid_positions
from models.released import ReleasedNames, sequential_resnet

TupleSizes = list[Annotated[int, Field(ge=1)]]


class TrxOptions(FrameEncoderOptions, AdapterChoice):
    """The `MODEL` section of TRX; the defaults are those of the release."""

    TUPLES: TupleSizes = Field([2, 3], min_length=1, description="frames in a tuple, one transformer for each number")
    TUPLE_WIDTH: int = Field(1152, ge=1, description="d, the width of keys and values")
    POSITION_SCALE: float = Field(0.1, ge=0, description="size of the sinusoids that are added to the frames")
    DROPOUT: float = Field(0.1, ge=0, lt=1, description="dropout on the frames with their positions")


class CrossTransformer(nn.Module):
    """Keys and values of all tuples of one number of frames."""

    def __init__(self, width: int, size: int, options: TrxOptions) -> None:
        """Builds the layers for width D and tuples of `size` frames, m in the equations."""
        super().__init__()
        self.position_scale = options.POSITION_SCALE
        self.dropout = nn.Dropout(options.DROPOUT)
        self.key = TupleLinear(width, size, options.TUPLE_WIDTH)
        self.norm = nn.LayerNorm(options.TUPLE_WIDTH)
        self.value = TupleLinear(width, size, options.TUPLE_WIDTH, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """Maps float [..., T, D] -> float [..., P, 2 d], the key of each tuple and then its value."""
        length, width = frames.shape[-2:]
        positions = sinusoid_positions(length, width, self.position_scale, device=frames.device)
        placed = self.dropout(frames + positions)
        return torch.cat([self.norm(self.key(placed)), self.value(placed)], dim=-1)


def released_names(transformers: int) -> dict[str, str]:
    """Returns the names of the given number of `CrossTransformer`s in the released code."""
    parts = {"k_linear": "key", "norm_k": "norm", "v_linear": "value"}
    prefixes = [f"transformers.{number}" for number in range(transformers)]
    return {f"{prefix}.{released}": f"{prefix}.{name}" for prefix in prefixes for released, name in parts.items()}


def released_unused(transformers: int) -> tuple[str, ...]:
    """Returns the entries of released checkpoints that no score uses, for the given number of `CrossTransformer`s."""
    parts = ("v_linear.bias", "norm_v", "pe")
    return tuple(f"transformers.{number}.{part}" for number in range(transformers) for part in parts)


@register("trx")
class Trx(FrameMethod):
    """TRX; each query is scored alone."""

    Options = TrxOptions
    released = ReleasedNames(
        used=released_names(2),
        unused=released_unused(2),
        backbone=sequential_resnet("resnet"),
        rows={"TUPLE_WIDTH": "transformers.0.value.weight"},
    )

    def __init__(self, options: TrxOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        self.options = options
        self.transformers = nn.ModuleList(CrossTransformer(self.encoder.width, m, options) for m in options.TUPLES)

    def precompute_support(self, support: Tensor, class_text: Tensor) -> Tensor:
        """Computes keys and values of all tuples: float [B, N, K, T, D] -> float32 [B, N, K, P, 2 d], P over all m."""
        return self._keys_and_values(support)

    def precompute_query(self, query: Tensor) -> Tensor:
        """Computes keys and values of all tuples: float [B, Q, T, D] -> float32 [B, Q, P, 2 d], P over all m."""
        return self._keys_and_values(query)

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Computes score = -(mean over the m of D_m); the texts are not used.

        Args:
            support: float32 [B, N, K, P, 2 d], from `precompute_support`.
            query: float32 [B, Q, P, 2 d], from `precompute_query`.
            class_text: float [B, N, 1], not used.

        Returns:
            float32 [B, Q, N].
        """
        distances = [tuple_distances(*pair) for pair in zip(self._by_size(query), self._by_size(support), strict=True)]
        return -torch.stack(distances).mean(dim=0)

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """Returns the attention as a pairing of frames: the weight of two tuples goes to their frames by place."""
        width = 2 * self.options.TUPLE_WIDTH  # STRM appends projections
        queries, supports = (self._by_size(self._keys_and_values(videos)[..., :width]) for videos in (query, support))
        pairings: dict[str, Tensor | None] = {}
        for size, query_tuples, support_tuples in zip(self.options.TUPLES, queries, supports, strict=True):
            places = F.one_hot(frame_tuples(query.shape[2], size)).to(query_tuples)
            support_places = F.one_hot(frame_tuples(support.shape[3], size)).to(query_tuples)
            weights = attention(query_tuples, support_tuples)
            pairings[f"tuples of {size}"] = torch.einsum("bqpnkr,pmt,rms->bqnts", weights, places, support_places)
        return Explanation(pairings)

    def _keys_and_values(self, videos: Tensor) -> Tensor:
        """Maps float [..., T, D] -> float32 [..., P, 2 d], ordered by m."""
        return torch.cat([transformer(videos.float()) for transformer in self.transformers], dim=-2)

    def _by_size(self, tuples: Tensor) -> Sequence[Tensor]:
        """Splits [..., P, 2 d] -> [..., P_m, 2 d] for each m."""
        counts = ([max(1, math.comb(frames, m)) for m in self.options.TUPLES] for frames in count(1))
        # The number of tuples grows with the frames, so the sum determines each number.
        return tuples.split(next(sizes for sizes in counts if sum(sizes) >= tuples.shape[-2]), dim=-2)


def tuple_distances(query: Tensor, support: Tensor) -> Tensor:
    """Computes D_m: the mean over a query's tuples of the squared distance to their prototypes.

    || v - sum_r a_r v_r ||^2 = || v ||^2 - 2 sum_r a_r v . v_r + sum_rs a_r a_s v_r . v_s, so no prototype is
    built: there would be Q N P of them, each of width d. The mean of the support's values is subtracted from all
    values, which does not change the distances and keeps the three terms small.

    Args:
        query: keys and values, float [B, Q, P, 2 d].
        support: keys and values, float [B, N, K, P, 2 d].

    Returns:
        float [B, Q, N].
    """
    weights = attention(query, support).flatten(-2)
    query_values, values = query.chunk(2, dim=-1)[1], support.chunk(2, dim=-1)[1].flatten(2, 3)
    centre = values.mean(dim=(1, 2))
    query_values, values = query_values - centre[:, None, None], values - centre[:, None, None]
    to_values = torch.einsum("bqpd,bnrd->bqpnr", query_values, values)
    among_values = torch.einsum("bqpnr,bnrs->bqpns", weights, values @ values.mT)
    squared = query_values.square().sum(dim=-1, keepdim=True) + (weights * (among_values - 2 * to_values)).sum(dim=-1)
    return squared.mean(dim=2)


def attention(query: Tensor, support: Tensor) -> Tensor:
    """Computes the weights a of `tuple_distances`: float [B, Q, P, N, K, P]; they sum to 1 over the last two axes."""
    query_keys, keys = query.chunk(2, dim=-1)[0], support.chunk(2, dim=-1)[0]
    products = torch.einsum("bqpd,bnkrd->bqpnkr", query_keys, keys) / math.sqrt(keys.shape[-1])
    return products.flatten(-2).softmax(dim=-1).view_as(products)
