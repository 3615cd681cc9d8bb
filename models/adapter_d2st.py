"""D2ST-Adapter: disentangled and deformable attention in space and in time, after every block of the image tower.

    u    = GELU( W_d x ),   then u <- u + depthwise 3 x 3 x 3 convolution of u over time, rows and columns (patches)
    s, t = u + DA_S( LayerNorm u ),   u + DA_T( LayerNorm u )
    x   <- x + GELU( W_u GELU( (s + t) / 2 ) )                                W_u starts at 0: the identity at first

Deformable attention DA works in groups of channels, which are its heads. A strided depthwise convolution of the queries
gives a coarse grid of n cells with one offset each; the patches sampled there are the keys and values of all tokens:
    o    = W_2 GELU( LayerNorm( convolution( W_q u ) ) ),   p = centre of the cell + tanh(o) min(1, 2 / cells)
    DA   = W_o softmax( (W_q u) (W_k u(p))^T / sqrt(c) ) (W_v u(p))
DA_S has few cells in time and many in space, DA_T the opposite. On a ResNet the adapters follow its four stages,
without class token and without the two outer GELUs.

Shapes: V videos, T frames, L patches in rows x columns, P + L tokens of a frame (P = 1 with a class token, else 0),
C width of the tower, D of an adapter, g groups, c = D / g, n samples.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from models.tower_plugin import TemporalEmbedding, TowerPlugin, each_frame, last
from utils.errors import UserError
from utils.schema import Section

Size = tuple[int, int, int]  # in time, rows, columns


class Sampling(NamedTuple):
    """The convolution of the offsets, without padding; each cell of its output is a sample."""

    kernel: Size
    stride: Size


class Pathways(NamedTuple):
    """Sampling of the two attentions of an adapter."""

    groups: int
    spatial: Sampling
    temporal: Sampling


VIT_PATHWAYS = Pathways(4, Sampling((4, 5, 5), (4, 3, 3)), Sampling((1, 7, 7), (1, 7, 7)))
STAGE_PATHWAYS = (
    Pathways(1, Sampling((4, 7, 7), (4, 7, 7)), Sampling((1, 14, 14), (1, 14, 14))),
    Pathways(2, Sampling((4, 7, 7), (4, 7, 7)), Sampling((1, 14, 14), (1, 14, 14))),
    VIT_PATHWAYS,
    Pathways(8, Sampling((4, 4, 4), (4, 3, 3)), Sampling((1, 7, 7), (1, 7, 7))),
)
MIN_PATCHES = 7  # in a row or column, for the kernels of a ViT and of the last stage of a ResNet
LAST_STRIDE = 32  # pixels between two positions of that stage


class D2stAdapterOptions(Section):
    """The sizes of the adapters; the defaults are those of the release."""

    RATIO: float = Field(0.25, gt=0, le=1, description="width of an adapter, in units of the tower's")
    BLOCKS: int | None = Field(None, ge=1, description="number of last blocks with adapters; null: all")
    FRAMES: int = Field(
        8, ge=1, description="ViT: length of the temporal embedding, which is interpolated for other clip lengths"
    )
    TRAIN_TOKENS: bool = Field(
        True,
        description="ViT: train the temporal embedding and the class token too, so that gradients pass every block",
    )


def samples(volume: Tensor, positions: Tensor) -> Tensor:
    """Samples a volume at given positions, by trilinear interpolation with zeros outside.

    Each patch has the weight max(0, 1 - distance), multiplied over time, rows and columns. Matrix products are used
    because the gradient of torch's `grid_sample` is not deterministic on a GPU.

    Args:
        volume: float [V, T, rows, columns, c].
        positions: in time, rows and columns, float [V, n, 3]; -1 and 1 are the centres of the first and last patch.

    Returns:
        float [V, n, c].
    """
    axes = zip(positions.float().unbind(dim=-1), volume.shape[1:4], strict=True)
    time, rows, columns = (
        F.relu(1 - ((position + 1) / 2 * (size - 1)).unsqueeze(-1).sub(torch.arange(size, device=volume.device)).abs())
        for position, size in axes
    )
    weights = time[..., :, None, None] * rows[..., None, :, None] * columns[..., None, None, :]
    return weights.flatten(2).to(volume.dtype) @ volume.flatten(1, 3)


def cell_centres(cells: Sequence[int], device: torch.device) -> Tensor:
    """Returns the centres of the cells of a grid over [-1, 1] in each direction: float32 [n, 3]."""
    centres = [(2 * torch.arange(size, device=device) + 1) / size - 1 for size in cells]
    return torch.cartesian_prod(*centres)


class DeformableAttention(nn.Module):
    """DA: attention of all tokens of a video to a few samples of its patches at learned positions."""

    def __init__(self, width: int, groups: int, sampling: Sampling) -> None:
        super().__init__()
        group_width = width // groups
        self.groups, self.shortest = groups, sampling.kernel[0]
        self.to_query, self.to_key, self.to_value, self.project = (nn.Linear(width, width) for _ in range(4))
        self.look = nn.Conv3d(group_width, group_width, sampling.kernel, sampling.stride, groups=group_width)
        self.norm = nn.LayerNorm(group_width)
        self.move = nn.Conv3d(group_width, 3, kernel_size=1, bias=False)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps float [V, T, P + L, D] -> float [V, T, P + L, D], without the residual; grid: rows, columns."""
        query = self.to_query(tokens)
        patches = self._volume(tokens, grid)
        sampled = samples(patches, self.positions(self._volume(query, grid)))
        sampled = rearrange(sampled, "(v g) n c -> v n (g c)", g=self.groups)
        heads = (
            rearrange(values, "v n (g c) -> v g n c", g=self.groups)
            for values in (query.flatten(1, 2), self.to_key(sampled), self.to_value(sampled))
        )
        mixed = rearrange(F.scaled_dot_product_attention(*heads), "v g n c -> v n (g c)")
        return self.project(mixed).unflatten(1, tokens.shape[1:3])

    def positions(self, queries: Tensor) -> Tensor:
        """Computes the positions p from patch queries: float [V g, T, rows, columns, c] -> float32 [V g, n, 3]."""
        maps = rearrange(queries, "v t y x c -> v c t y x")
        if missing := max(0, self.shortest - maps.shape[2]):  # a clip shorter than the kernel repeats its last frame
            maps = F.pad(maps, (0, 0, 0, 0, 0, missing), mode="replicate")
        cells = rearrange(self.look(maps), "v c t y x -> v t y x c")
        offsets = self.move(rearrange(F.gelu(self.norm(cells)), "v t y x c -> v c t y x"))
        sizes = offsets.shape[2:]
        directions = offsets.float().tanh().flatten(2).unbind(dim=1)
        moves = [direction * min(1.0, 2 / size) for direction, size in zip(directions, sizes, strict=True)]
        return cell_centres(sizes, offsets.device) + torch.stack(moves, dim=-1)

    def _volume(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Groups the patches: float [V, T, P + L, D] -> float [V g, T, rows, columns, c]."""
        rows, columns = grid
        patches = tokens[:, :, -rows * columns :]
        return rearrange(patches, "v t (y x) (g c) -> (v g) t y x c", y=rows, g=self.groups)


class D2stAdapter(nn.Module):
    """The adapter after one block."""

    def __init__(self, width: int, options: D2stAdapterOptions, pathways: Pathways, outer_gelu: bool) -> None:
        """Builds the layers for width C; `outer_gelu` adds a GELU after W_d and after W_u."""
        super().__init__()
        inner = pathways.groups * max(1, int(width * options.RATIO) // pathways.groups)
        self.outer_gelu = outer_gelu
        self.down = nn.Linear(width, inner)
        self.place = nn.Conv3d(inner, inner, kernel_size=3, padding=1, groups=inner)
        self.spatial_norm, self.temporal_norm = nn.LayerNorm(inner), nn.LayerNorm(inner)
        self.spatial = DeformableAttention(inner, pathways.groups, pathways.spatial)
        self.temporal = DeformableAttention(inner, pathways.groups, pathways.temporal)
        self.up = nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps float [V, T, P + L, C] -> float [V, T, P + L, C], with the residual; grid: rows, columns."""
        inner = self._outer(self.down(tokens))
        class_token, patches = inner.tensor_split([inner.shape[2] - grid[0] * grid[1]], dim=2)
        maps = rearrange(patches, "v t (y x) d -> v d t y x", y=grid[0])
        inner = torch.cat([class_token, patches + rearrange(self.place(maps), "v d t y x -> v t (y x) d")], dim=2)
        spatial = self.spatial(self.spatial_norm(inner), grid)
        temporal = self.temporal(self.temporal_norm(inner), grid)
        return tokens + self._outer(self.up(F.gelu(inner + (spatial + temporal) / 2)))

    def _outer(self, values: Tensor) -> Tensor:
        return F.gelu(values) if self.outer_gelu else values


class D2stAdapters(TowerPlugin):
    """The adapters of a ViT, with a temporal embedding, a class token and a last norm that are trained too.

    The features are the normalised class tokens, C wide, without CLIP's projection.
    """

    def __init__(self, visual: Any, options: D2stAdapterOptions) -> None:
        """Moves the class token and `ln_post` from the tower into this module, and removes the tower's projection.

        Raises:
            UserError: the grid of patches is smaller than the kernels.
        """
        super().__init__(visual)
        if min(visual.grid_size) < MIN_PATCHES:
            raise UserError(
                f"MODEL.BACKBONE, DATA.IMG_SIZE: the adapters of D2ST need {MIN_PATCHES} x {MIN_PATCHES} patches "
                f"or more, found {visual.grid_size[0]} x {visual.grid_size[1]}; use larger frames or smaller patches"
            )
        self.grid: tuple[int, int] = visual.grid_size
        self.width: int = visual.transformer.width
        blocks = len(visual.transformer.resblocks)
        self.first = blocks - min(blocks, options.BLOCKS or blocks) + 1
        trained = options.TRAIN_TOKENS
        self.class_token = nn.Parameter(visual.class_embedding.detach().clone(), requires_grad=trained)
        self.time = TemporalEmbedding(options.FRAMES, self.width) if trained else None
        self.norm = visual.ln_post.requires_grad_(True)
        del visual.class_embedding, visual.ln_post, visual.proj
        self.adapters = nn.ModuleList(
            D2stAdapter(self.width, options, VIT_PATHWAYS, outer_gelu=True) for _ in range(self.first, blocks + 1)
        )

    def class_embedding(self, visual: Any) -> Tensor:
        """See `TowerPlugin`."""
        return self.class_token

    def before_blocks(self, tokens: Tensor) -> Tensor:
        """Adds the temporal embedding to all tokens of a frame."""
        return tokens if self.time is None else self.time(tokens)

    def block(self, number: int, block: Any, tokens: Tensor) -> Tensor:
        """Applies the block, then its adapter."""
        tokens = each_frame(block, tokens)
        return tokens if number < self.first else self.adapters[number - self.first](tokens, self.grid)

    def read(self, visual: Any, levels: Iterator[Tensor]) -> Tensor:
        """Returns the normalised class token: float [V, T, C]."""
        return self.norm(last(levels)[:, :, 0])


class D2stResnetAdapters(TowerPlugin):
    """The adapters of a ResNet, after its four stages; the features are the ResNet's, averaged over the last map."""

    on_resnets = True

    def __init__(self, visual: Any, options: D2stAdapterOptions, image_size: int) -> None:
        """Builds the adapters; `image_size` is the height and width of the frames in pixels.

        Raises:
            UserError: the last map is smaller than the kernels.
        """
        super().__init__(visual)
        if image_size <= LAST_STRIDE * (MIN_PATCHES - 1):
            raise UserError(
                f"DATA.IMG_SIZE is {image_size}, but the adapters of D2ST on a ResNet need frames of "
                f"{LAST_STRIDE * (MIN_PATCHES - 1) + 1} pixels or more"
            )
        last_blocks = [stage[-1] for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4)]
        widths = [getattr(block, "conv3", block.conv2).out_channels for block in last_blocks]
        self.width = widths[-1]
        self.first = len(widths) - min(len(widths), options.BLOCKS or len(widths)) + 1
        self.adapters = nn.ModuleList(
            D2stAdapter(width, options, pathways, outer_gelu=False)
            for width, pathways in list(zip(widths, STAGE_PATHWAYS, strict=True))[self.first - 1 :]
        )

    def block(self, number: int, block: Any, tokens: Tensor) -> Tensor:
        """Applies the stage, then its adapter: float [V, T, C, h, w] -> float [V, T, C', h', w']."""
        maps = each_frame(block, tokens)
        if number < self.first:
            return maps
        rows, columns = maps.shape[-2:]
        adapted = self.adapters[number - self.first](rearrange(maps, "v t c y x -> v t (y x) c"), (rows, columns))
        return rearrange(adapted, "v t (y x) c -> v t c y x", y=rows)

    def read(self, visual: Any, levels: Iterator[Tensor]) -> Tensor:
        """Returns the mean over the last map: float [V, T, C]."""
        return last(levels).mean(dim=(-2, -1))
