"""AIM's adapters (Yang et al., ICLR 2023), as placed by Task-Adapter: within the frozen blocks, for one video.

    x <- x + T( A(ln_1 x) over the frames, for each token )          A: the block's own attention, used twice
    x <- x + S( A(ln_1 x) over the tokens, for each frame )
    x <- x + MLP(ln_2 x) + s J(ln_2 x)
    T = J = b,   S(z) = z + b(z),   b(z) = W_2 GELU(W_1 z)           W_2 starts at 0, so a block starts as CLIP's

A learned vector for each frame is added before the blocks. In Task-Adapter the videos of an episode also attend to
each other within a block, so that a feature depends on the other videos; that attention is not implemented here.

Shapes: V videos, T frames, L tokens with the class token, C width of the tower.
"""

from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.frame_tower import FrameTower
from models.tower_plugin import TemporalEmbedding, TowerPlugin, each_frame
from utils.schema import HEAD_ONLY, ModelOptions, Section


class AimOptions(Section):
    """The sizes of the adapters."""

    RATIO: float = Field(0.25, gt=0, description="width of an adapter, in units of the tower's")
    BLOCKS: int | None = Field(
        None, ge=1, description="number of last blocks with adapters (Task-Adapter: 2, SSv2: 6); null: all (AIM)"
    )
    JOINT_SCALE: float = Field(1.0, ge=0, description="s, factor on the adapter beside the MLP (AIM: 0.5)")
    FRAMES: int = Field(
        8, ge=1, description="length of the temporal embedding, which is interpolated for other clip lengths"
    )
    TRAIN_TOKENS: bool = Field(
        True, description="train the temporal embedding, so that gradients pass every block; false: no embedding"
    )


class Bottleneck(nn.Module):
    """The bottleneck b."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        inner = max(1, int(width * ratio))
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, values: Tensor) -> Tensor:
        """Maps float [..., C] -> float [..., C]."""
        return self.up(F.gelu(self.down(values)))


class BlockAdapters(nn.Module):
    """The adapters T, S and J of one block."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.time, self.space, self.joint = (Bottleneck(width, ratio) for _ in range(3))

    def over_time(self, block: Any, tokens: Tensor) -> Tensor:
        """Maps float [V, T, L, C] -> float [V, T, L, C]; each token attends to itself in all frames."""
        videos, frames = tokens.shape[:2]
        attended = attend(block, rearrange(tokens, "v t l c -> (v l) t c"))
        return tokens + rearrange(self.time(attended), "(v l) t c -> v t l c", v=videos, t=frames)

    def over_space(self, block: Any, tokens: Tensor) -> Tensor:
        """Maps float [V, T, L, C] -> float [V, T, L, C]; the tokens of a frame attend to each other."""
        attended = attend(block, tokens.flatten(0, 1)).view_as(tokens)
        return tokens + attended + self.space(attended)

    def mlp(self, block: Any, tokens: Tensor, scale: float) -> Tensor:
        """Maps float [V, T, L, C] -> float [V, T, L, C], each token separately."""
        normalised = block.ln_2(tokens)
        return tokens + block.ls_2(block.mlp(normalised)) + scale * self.joint(normalised)


def attend(block: Any, tokens: Tensor) -> Tensor:
    """Applies the first norm and the attention of a block of the tower: float [S, L, C] -> float [S, L, C]."""
    return block.ls_1(block.attention(block.ln_1(tokens)))


class AimAdapters(TowerPlugin):
    """The adapters of a ViT; the features are CLIP's, with its projection."""

    def __init__(self, visual: Any, options: AimOptions) -> None:
        super().__init__(visual)
        width, blocks = visual.transformer.width, len(visual.transformer.resblocks)
        self.first = blocks - min(blocks, options.BLOCKS or blocks) + 1
        self.joint_scale = options.JOINT_SCALE
        self.time = TemporalEmbedding(options.FRAMES, width) if options.TRAIN_TOKENS else None
        self.adapters = nn.ModuleList(BlockAdapters(width, options.RATIO) for _ in range(self.first, blocks + 1))

    def before_blocks(self, tokens: Tensor) -> Tensor:
        """Adds the temporal embedding to all tokens of a frame."""
        return tokens if self.time is None else self.time(tokens)

    def block(self, number: int, block: Any, tokens: Tensor) -> Tensor:
        """Applies the block with its adapters."""
        if number < self.first:
            return each_frame(block, tokens)
        adapters: Any = self.adapters[number - self.first]
        tokens = adapters.over_space(block, adapters.over_time(block, tokens))
        return adapters.mlp(block, tokens, self.joint_scale)


# --- MODEL.ADAPTER ------------------------------------------------------------------------------------------


class AimChoice(ModelOptions):
    """The keys of a method that needs CLIP's features in the space of the texts."""

    ADAPTER: Literal["none", "aim"] = Field(
        "none", description="layers within CLIP's ViT, whose own weights then stay as loaded: none or aim"
    )
    AIM: AimOptions = AimOptions()

    @property
    def key_of_backbone_layers(self) -> str:
        """See `ModelOptions`."""
        return "" if self.ADAPTER == "none" else "ADAPTER"

    @model_validator(mode="before")
    @classmethod
    def _freeze_tower_around_adapter(cls, data: Any) -> Any:
        """Sets the default of TRAINABLE, which depends on the adapter."""
        if isinstance(data, dict) and data.get("ADAPTER", cls.model_fields["ADAPTER"].default) != "none":
            return {"TRAINABLE": HEAD_ONLY, **data}
        return data

    def attach_adapter(self, tower: FrameTower, image_size: int) -> TowerPlugin | None:
        """Attaches and returns the adapter of MODEL.ADAPTER, or None if it is `none`.

        Args:
            tower: the image tower of the method.
            image_size: height and width of the frames in pixels.

        Raises:
            UserError: the tower does not support plug-ins, or the adapter does not fit it.
        """
        return None if self.ADAPTER == "none" else tower.attach(partial(AimAdapters, options=self.AIM))
