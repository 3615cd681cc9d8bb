"""Ladder side network: a narrow transformer beside CLIP's frozen image tower (TS-FSAR, AAAI 2026).

    x_0     = r_0( LayerNorm_0(f_0) )                                           f_0: tokens before CLIP's block 1
    x_i+1   = a_i block_i(x_i) + (1 - a_i) r_i+1( LayerNorm_i+1(f_i+1) )        f_i+1: after CLIP's block i + 1
    a_i     = sigmoid( s_i / GATE_TEMPERATURE ),  s_i a learned number that starts at 0

r reduces all tokens of CLIP to width d. In a spatial block the tokens of a frame attend to each other; in a temporal
block each token attends to itself in all frames. No gradient passes through CLIP, so a step does not store activations
of its blocks. The network has no positions: f contains those of CLIP's tokens, and a temporal block ignores the order
of the frames.

The blocks start as CLIP's blocks, reduced to d: the rows of a weight are projected onto their first principal
components (exactly; the release uses a randomised solver for most of them).
`MODEL.ADAPTER: side-network` adds the network to other methods; the feature of a frame is then its class token.

Shapes: V videos, T frames, L patches, C width of the tower, d width of the side network.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from models.tower_plugin import TowerPlugin
from utils.errors import UserError
from utils.schema import Section

Job = tuple[nn.Parameter, Callable[[], Tensor]]  # a parameter and the function that computes its initial value


class SideNetworkOptions(Section):
    """Sizes of the side network; the defaults are those of the release."""

    WIDTH: int = Field(256, ge=1, description="d, a multiple of HEAD_DIM")
    HEAD_DIM: int = Field(64, ge=1, description="width of an attention head")
    MLP_RATIO: float = Field(4.0, gt=0, description="hidden width of a block's feed-forward layer, in units of d")
    TEMPORAL_BLOCKS: list[int] | None = Field(
        None, description="blocks that attend over time, from 0; null: every other block of the second half (6, 8, 10)"
    )
    GATE_TEMPERATURE: float = Field(0.1, gt=0, description="divisor of the learned numbers behind the gates")
    INITIALISE: Literal["clip", "random"] = Field(
        "clip", description="initial weights: CLIP's blocks reduced by principal components, or random"
    )


class SelfAttention(nn.Module):
    """Multi-head attention with biases, without norm or dropout: float [..., L, D] -> float [..., L, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_query, self.to_key, self.to_value, self.project = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps float [..., L, D] -> float [..., L, D]."""
        sequences = tokens.reshape(-1, *tokens.shape[-2:])  # fast attention and ONNX need one dimension before heads
        query, key, value = (
            rearrange(projection(sequences), "s l (h c) -> s h l c", h=self.heads)
            for projection in (self.to_query, self.to_key, self.to_value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.project(rearrange(mixed, "s h l c -> s l (h c)")).reshape(tokens.shape)


class SideBlock(nn.Module):
    """One block of the side network."""

    def __init__(self, options: SideNetworkOptions, temporal: bool) -> None:
        super().__init__()
        width, hidden = options.WIDTH, max(1, int(options.WIDTH * options.MLP_RATIO))
        self.temporal = temporal
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, width // options.HEAD_DIM)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps float [V, T, 1+L, d] -> float [V, T, 1+L, d]."""
        normalised = self.attention_norm(tokens)
        if self.temporal:
            attended = self.attention(normalised.transpose(1, 2)).transpose(1, 2)
        else:
            attended = self.attention(normalised)
        tokens = tokens + attended
        return tokens + self.contract(F.gelu(self.expand(self.mlp_norm(tokens))))


class SideNetwork(TowerPlugin):
    """The side network.

    Attributes:
        reads_patches: whether `read` returns the weighted patches of a frame, for distance correlation, or its class
            token.
    """

    reads_patches = False

    def __init__(self, visual: Any, options: SideNetworkOptions) -> None:
        """Builds the network beside open_clip's VisionTransformer.

        Raises:
            UserError: the options contradict each other, or do not fit the tower.
        """
        super().__init__(visual)
        clip_blocks = list(visual.transformer.resblocks)
        _check_options(options, visual.transformer.width, len(clip_blocks))
        self.width: int = options.WIDTH
        self.gate_temperature = options.GATE_TEMPERATURE
        levels, clip_width = len(clip_blocks) + 1, visual.transformer.width
        self.norms = nn.ModuleList(nn.LayerNorm(clip_width) for _ in range(levels))
        self.reduce = nn.ModuleList(nn.Linear(clip_width, options.WIDTH, bias=False) for _ in range(levels))
        temporal = temporal_blocks(options, len(clip_blocks))
        self.blocks = nn.ModuleList(SideBlock(options, i in temporal) for i in range(len(clip_blocks)))
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in clip_blocks)
        if options.INITIALISE == "clip":
            jobs = [
                job for block, clip in zip(self.blocks, clip_blocks, strict=True) for job in _block_jobs(block, clip)
            ]
            initialise(jobs)

    def read(self, visual: Any, levels: Iterator[Tensor]) -> Tensor:
        """Returns the class token of each frame, float [V, T, d], or its weighted patches, float [V, T, L, d]."""
        tokens, _ = self.climb(levels)
        return weighted_patches(tokens) if self.reads_patches else tokens[:, :, 0]

    def climb(self, levels: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the tokens x of the last level, float [V, T, 1+L, d], and those of CLIP, float [V, T, 1+L, C]."""
        level = next(levels)
        tokens = self._reduced(0, level)
        for i, level in enumerate(levels):
            gate = torch.sigmoid(self.gates[i] / self.gate_temperature)
            below = self._reduced(i + 1, level)
            tokens = below + gate * (self.blocks[i](tokens) - below)
        return tokens, level

    def _reduced(self, i: int, level: Tensor) -> Tensor:
        """Computes r_i(LayerNorm_i(f)), with the norm's scale and shift in r, so only one large tensor is stored."""
        norm: Any = self.norms[i]
        weight: Any = self.reduce[i].weight
        normalised = F.layer_norm(level, norm.normalized_shape, eps=norm.eps)
        return F.linear(normalised, weight * norm.weight, weight @ norm.bias)


def weighted_patches(tokens: Tensor) -> Tensor:
    """Computes cos(c, p) p for the class token c and each patch p: float [V, T, 1+L, d] -> float [V, T, L, d]."""
    class_token, patches = tokens[:, :, :1], tokens[:, :, 1:]
    return F.cosine_similarity(class_token, patches, dim=-1).unsqueeze(-1) * patches


def temporal_blocks(options: SideNetworkOptions, blocks: int) -> list[int]:
    """Returns the numbers of the temporal blocks, from 0."""
    if options.TEMPORAL_BLOCKS is None:
        return list(range(blocks // 2, blocks - 1, 2))
    return options.TEMPORAL_BLOCKS


def _check_options(options: SideNetworkOptions, clip_width: int, blocks: int) -> None:
    if options.WIDTH % options.HEAD_DIM:
        raise UserError(
            f"MODEL.SIDE.WIDTH is {options.WIDTH} and MODEL.SIDE.HEAD_DIM {options.HEAD_DIM}: set WIDTH to a multiple "
            "of HEAD_DIM"
        )
    if outside := [i for i in temporal_blocks(options, blocks) if not 0 <= i < blocks]:
        raise UserError(
            f"MODEL.SIDE.TEMPORAL_BLOCKS contains {outside[0]}, but the backbone has blocks 0 to {blocks - 1}: use "
            "some of these, or null"
        )
    too_small = clip_width < options.WIDTH or 4 * clip_width < int(options.WIDTH * options.MLP_RATIO)
    if options.INITIALISE == "clip" and too_small:
        raise UserError(
            f"MODEL.SIDE.WIDTH is {options.WIDTH} and MODEL.SIDE.MLP_RATIO {options.MLP_RATIO:g}, but the backbone's "
            f"blocks are {clip_width} wide, too small to initialise it: set WIDTH to {clip_width} or less, or "
            "MODEL.SIDE.INITIALISE to random"
        )


# --- initial weights from CLIP's blocks ---------------------------------------------------------------------


def attention_jobs(attention: SelfAttention, clip_attention: Any) -> list[Job]:
    """Returns the parameters of an attention with their initial values from CLIP's `nn.MultiheadAttention`."""
    projections = (attention.to_query, attention.to_key, attention.to_value, attention.project)
    weights = [*clip_attention.in_proj_weight.chunk(3), clip_attention.out_proj.weight]
    biases = [*clip_attention.in_proj_bias.chunk(3), clip_attention.out_proj.bias]
    layers = zip(projections, weights, biases, strict=True)
    return [job for layer, weight, bias in layers for job in _layer_jobs(layer, weight, bias)]


def _block_jobs(block: Any, clip_block: Any) -> list[Job]:
    pairs = (
        (block.attention_norm, clip_block.ln_1),
        (block.mlp_norm, clip_block.ln_2),
        (block.expand, clip_block.mlp.c_fc),
        (block.contract, clip_block.mlp.c_proj),
    )
    jobs = attention_jobs(block.attention, clip_block.attn)
    return jobs + [job for layer, clip_layer in pairs for job in _layer_jobs(layer, clip_layer.weight, clip_layer.bias)]


def _layer_jobs(layer: Any, weight: Tensor, bias: Tensor) -> list[Job]:
    pairs = ((layer.weight, weight), (layer.bias, bias))
    return [(parameter, partial(reduced, values, parameter.shape)) for parameter, values in pairs]


@torch.no_grad()
def initialise(jobs: list[Job]) -> None:
    """Initialises each parameter, on all cores, since the matrices of ViT-B/16 take half a minute on one core.

    Raises:
        UserError: a value is not finite, since the weights of the backbone are damaged.
    """
    if any(parameter.is_meta for parameter, _ in jobs):  # only names and shapes matter
        return
    with ThreadPoolExecutor() as pool:
        for (parameter, _), value in zip(jobs, pool.map(lambda job: job[1](), jobs), strict=True):
            if not value.isfinite().all():
                raise UserError(
                    "MODEL.SIDE.INITIALISE: the principal components of the backbone's weights are not finite; use "
                    "other weights, or set it to random"
                )
            parameter.copy_(value)


@torch.no_grad()
def reduced(values: Tensor, shape: torch.Size) -> Tensor:
    """Returns a weight or a bias of CLIP in a smaller shape.

    A vector is resampled (bicubic). The rows of a matrix are projected onto their first principal components, and the
    first rows are kept. The result has at most as many columns as rows; otherwise the transposed matrix is reduced.

    Args:
        values: float [R, C] or [R].
        shape: shape of the result.

    Raises:
        ValueError: the matrix is too small for this shape.
    """
    if values.ndim == 1:
        return F.interpolate(values[None, None, :, None], size=(shape[0], 1), mode="bicubic")[0, 0, :, 0]
    rows, columns = shape
    if rows < columns:
        return reduced(values.T, torch.Size((columns, rows))).T
    if rows > values.shape[0] or columns > min(values.shape):
        raise ValueError(f"a matrix {list(values.shape)} has too few principal components for {list(shape)}")
    centred = (values - values.mean(dim=0)).double()
    _, directions = torch.linalg.eigh(centred.T @ centred)  # in ascending order of variance, one per column
    first = directions.flip(dims=[1])[:, :columns]
    signs = first.gather(0, first.abs().argmax(dim=0, keepdim=True)).sign()  # its largest entry is positive
    return (centred[:rows] @ (first * signs)).to(values.dtype)
