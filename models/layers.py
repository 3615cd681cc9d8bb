"""Layers that several methods share: attention and feed-forward blocks, positions of frames, tuples of frames.

Shapes: V sequences, L tokens, D features, T frames, P tuples of frames.
"""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from utils.schema import Section


class AttentionOptions(Section):
    """Sizes of one `Attention` whose heads share the features' width."""

    HEADS: int = Field(8, ge=1, description="attention heads")
    HEAD_DIM: int | None = Field(None, ge=1, description="width of each head; null: the features' width / HEADS")
    DROPOUT: float = Field(0.2, ge=0, lt=1, description="dropout after the attention's output projection")


class TransformerOptions(AttentionOptions):
    """Sizes of one `TransformerLayer`; the defaults are those of the released CLIP-SPM."""

    HEAD_DIM: int | None = Field(256, ge=1, description="width of each head; null: the features' width / HEADS")
    HIDDEN: int = Field(2048, ge=1, description="width of the feed-forward block's hidden layer")
    HIDDEN_DROPOUT: float = Field(0.05, ge=0, lt=1, description="dropout after each feed-forward layer")


class SharedWidthOptions(TransformerOptions):
    """`TransformerOptions` with heads that share the features' width, as in CLIP-FSAR and CPM2C."""

    HEAD_DIM: int | None = Field(None, ge=1, description="width of each head; null: the features' width / HEADS")


class Attention(nn.Module):
    """Multi-head attention over normalised tokens; query, key and value have no biases."""

    def __init__(self, width: int, options: AttentionOptions) -> None:
        super().__init__()
        inner = options.HEADS * (options.HEAD_DIM or max(1, width // options.HEADS))
        self.heads = options.HEADS
        self.norm = nn.LayerNorm(width)
        self.to_query = nn.Linear(width, inner, bias=False)
        self.to_key = nn.Linear(width, inner, bias=False)
        self.to_value = nn.Linear(width, inner, bias=False)
        self.project = nn.Linear(inner, width)
        self.dropout = nn.Dropout(options.DROPOUT)

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps float [V, L, D] -> float [V, L, D], without the residual; see `TransformerLayer`."""
        normalised = self.norm(tokens)
        attended = normalised if context is None else self.norm(context)
        inputs = ((self.to_query, normalised), (self.to_key, attended), (self.to_value, attended))
        query, key, value = (
            rearrange(projection(values), "v l (h c) -> v h l c", h=self.heads) for projection, values in inputs
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.dropout(self.project(rearrange(mixed, "v h l c -> v l (h c)")))


def feed_forward(width: int, hidden: int, dropout: float) -> nn.Sequential:
    """Applies two linear layers with a GELU between and dropout after each: float [..., D] -> float [..., D]."""
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, width),
        nn.Dropout(dropout),
    )


class TransformerLayer(nn.Module):
    """y = x + Attention(LayerNorm(x)); output y + FeedForward(y). No positions, no mask, no second norm."""

    def __init__(self, width: int, options: TransformerOptions) -> None:
        super().__init__()
        self.attention = Attention(width, options)
        self.feed_forward = feed_forward(width, options.HIDDEN, options.HIDDEN_DROPOUT)

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps float [V, L, D] -> float [V, L, D]; the order of the tokens does not matter.

        Args:
            tokens: float [V, L, D].
            context: float [V, M, D], which the tokens attend to; None: they attend to each other.
        """
        attended = tokens + self.attention(tokens, context)
        return attended + self.feed_forward(attended)


def motion_between(frames: Tensor, smooth: nn.Module) -> Tensor:
    """Adds temporal differences between smoothed and plain neighbours: [..., T, D] -> [..., T-1, D].

    Args:
        frames: float [..., T, D].
        smooth: convolutions over time, float [V, D, T] -> the same shape.
    """
    channels = rearrange(frames.flatten(0, -3), "v t d -> v d t")
    smoothed = rearrange(smooth(channels), "v d t -> v t d").unflatten(0, frames.shape[:-2])
    forward = smoothed[..., 1:, :] - frames[..., :-1, :]
    backward = smoothed[..., :-1, :] - frames[..., 1:, :]
    return forward + backward


ONE_HEAD = {"TRANSFORMER.HEADS": 1}  # the weights show the total width of the heads, not their number


def released_layer_names(released: str, ours: str) -> dict[str, str]:
    """Returns the names of a `TransformerLayer` in the released code: its prefixes -> ours, below `ours`."""
    attention, feed_forward = f"{released}.layers.0.0", f"{released}.layers.0.1"
    return {
        f"{attention}.norm": f"{ours}.attention.norm",
        f"{attention}.fn.to_q": f"{ours}.attention.to_query",
        f"{attention}.fn.to_k": f"{ours}.attention.to_key",
        f"{attention}.fn.to_v": f"{ours}.attention.to_value",
        f"{attention}.fn.to_out.0": f"{ours}.attention.project",
        f"{feed_forward}.net": f"{ours}.feed_forward",
    }


def released_attention_names(released: str, ours: str) -> dict[str, str | Sequence[str]]:
    """Returns the names of an `Attention` in released code that has query, key and value in one matrix."""
    return {
        f"{released}.norm": f"{ours}.norm",
        f"{released}.fn.to_qkv": (f"{ours}.to_query", f"{ours}.to_key", f"{ours}.to_value"),
        f"{released}.fn.to_out.0": f"{ours}.project",
    }


def layer_rows(ours: str) -> dict[str, str]:
    """Returns the entries of a one-head `TransformerLayer` below `ours` whose rows show the sizes in TRANSFORMER."""
    return {
        "TRANSFORMER.HEAD_DIM": f"{ours}.attention.to_query.weight",
        "TRANSFORMER.HIDDEN": f"{ours}.feed_forward.0.weight",
    }


def gate(width: int, hidden: float, negative_slope: float) -> nn.Sequential:
    """Computes sigmoid(W2 LeakyReLU(W1 x)): float [..., D] -> float [..., D] in (0, 1).

    `hidden` is in units of D, rounded down but at least one feature, since a gate without features is constant.
    """
    inner = max(1, int(width * hidden))
    return nn.Sequential(nn.Linear(width, inner), nn.LeakyReLU(negative_slope), nn.Linear(inner, width), nn.Sigmoid())


def sinusoid_positions(
    length: int,
    width: int,
    scale: float = 1.0,
    exponent: Literal["pair", "channel"] = "pair",
    device: torch.device | None = None,
) -> Tensor:
    """Returns the sinusoids that are added to frames to mark their positions.

    pos[t, i] = scale * sin(t / 10000^(e / D)) in even channels i, the cosine in odd ones.

    Args:
        length: T.
        width: D.
        scale: factor on all sinusoids.
        exponent: pair, the usual choice: e = i or i - 1, so a sine and its cosine have the same frequency; channel:
            e = 2 i, as in the released HyRSM and MoLo, so they have different frequencies.
        device: device of the result.

    Returns:
        float32 [T, D].
    """
    channel = torch.arange(width, dtype=torch.float64, device=device)
    power = channel - channel % 2 if exponent == "pair" else 2 * channel
    angle = torch.arange(length, device=device)[:, None] / 10000 ** (power / width)
    return scale * torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


class PositionOptions(Section):
    """Scaled frames with sinusoids; the defaults are those of the released HyRSM for most data sets."""

    DIVISOR: float = Field(10.0, gt=0, description="A: features of width D are scaled with sqrt(D / A)")
    SCALE: float = Field(1.0, ge=0, description="B: size of the sinusoids")
    DROPOUT: float = Field(0.1, ge=0, lt=1, description="dropout on the sum")


class Positions(nn.Module):
    """x sqrt(D / A) + B pos, then dropout: the positions of frames in HyRSM and MoLo."""

    def __init__(self, options: PositionOptions) -> None:
        super().__init__()
        self.options = options
        self.dropout = nn.Dropout(options.DROPOUT)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps float [V, L, D] -> float [V, L, D]."""
        length, width = tokens.shape[-2:]
        positions = sinusoid_positions(length, width, self.options.SCALE, "channel", tokens.device)
        return self.dropout(tokens * math.sqrt(width / self.options.DIVISOR) + positions)


def frame_tuples(frames: int, size: int, device: torch.device | None = None) -> Tensor:
    """Returns all tuples of frames in order, t1 < t2 < ...: int64 [P, size], P = binomial(frames, size).

    A video with fewer frames than a tuple has one tuple: all its frames, with the last one repeated.
    """
    if frames < size:
        return torch.arange(size, device=device).clamp(max=frames - 1)[None]
    return torch.tensor(list(combinations(range(frames), size)), device=device)


class TupleLinear(nn.Linear):
    """A linear layer on the features of every tuple of frames, W [x_t1; ...; x_tm] + b.

    With W split into a block W_i for each place of a tuple, the result is sum_i W_i x_ti + b. The products W_i x_t are
    computed once per frame; the P tuples, each m times as wide as a frame, are never built.
    """

    def __init__(self, width: int, size: int, out_width: int, bias: bool = True) -> None:
        """Builds the layer for width D and tuples of `size` frames, m in the equations."""
        super().__init__(size * width, out_width, bias)
        self.size = size

    def forward(self, frames: Tensor) -> Tensor:
        """Maps float [..., T, D] -> float [..., P, out_width], in the order of `frame_tuples`."""
        blocks = self.weight.chunk(self.size, dim=1)
        places = frame_tuples(frames.shape[-2], self.size, frames.device).unbind(dim=1)
        pairs = zip(blocks, places, strict=True)
        outputs = reduce(torch.add, (F.linear(frames, block)[..., times, :] for block, times in pairs))
        return outputs if self.bias is None else outputs + self.bias
