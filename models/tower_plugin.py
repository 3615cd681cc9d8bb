"""Tower plug-ins: layers that a method adds to an image tower, or features that it reads from within one.

On CLIP's vision transformer:

    tokens_0 = ln_pre( before_blocks( [class token; patches] + positions ) )
    tokens_i = block( i, block i of the tower, tokens_i-1 )                  i = 1 ... number of blocks
    feature  = read( tokens_0, tokens_1, ... )                               by default proj(ln_post(class token))

On torchvision's ResNets, the blocks are the four stages and the levels are maps; level 0 is the map of the stem. A
plug-in for them sets `on_resnets` and reads the feature itself.

A plug-in overrides the steps that it changes; it sees whole videos, so that its layers can mix frames.

Shapes: V videos, T frames, L patches, C width of the tower, D width of the features, h x w positions of a map.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.errors import UserError


class TowerPlugin(nn.Module):
    """Layers of a method within or beside the image tower; this base class changes nothing.

    The method owns it (`self.adapter = self.encoder.attach(MyPlugin)`), so the tower's weights keep CLIP's names in a
    checkpoint. MODEL.TRAINABLE only affects the tower, not the plug-in.

    Attributes:
        on_resnets: whether it fits ResNets instead of vision transformers.
        width: D, the length of the feature that `read` returns for a frame.
    """

    on_resnets: ClassVar[bool] = False

    def __init__(self, visual: Any) -> None:
        """Reads the sizes of open_clip's VisionTransformer, without keeping a reference to it.

        Args:
            visual: `visual.transformer.width` is C, `len(visual.transformer.resblocks)` the number of blocks,
                `visual.grid_size` the rows and columns of patches.
        """
        super().__init__()
        self.width: int = 0 if self.on_resnets else visual.output_dim

    def class_embedding(self, visual: Any) -> Tensor:
        """Returns the class token before its position is added: float [C]."""
        return visual.class_embedding

    def before_blocks(self, tokens: Tensor) -> Tensor:
        """Changes the tokens before `ln_pre`: float [V, T, 1+L, C] -> the same shape."""
        return tokens

    def block(self, number: int, block: Any, tokens: Tensor) -> Tensor:
        """Runs one block of the tower with the plug-in's layers within or after it.

        With ACTIVATION_CHECKPOINTING this is the unit that is recomputed.

        Args:
            number: number of the block, from 1.
            block: open_clip's ResidualAttentionBlock, with ln_1, attn, ls_1, ln_2, mlp and ls_2.
            tokens: float [V, T, 1+L, C]. For a ResNet these are a stage and maps, float [V, T, C, h, w].

        Returns:
            float [V, T, 1+L, C]; for a ResNet the maps after the stage.
        """
        return each_frame(block, tokens)

    def read(self, visual: Any, levels: Iterator[Tensor]) -> Tensor:
        """Returns the feature of each frame.

        Args:
            visual: open_clip's VisionTransformer.
            levels: the tokens after `ln_pre` and then after each block, float [V, T, 1+L, C] each. Each is computed
                on demand and freed when nothing refers to it, so a plug-in must keep those that it needs.

        Returns:
            float [V, T, D].
        """
        return clip_feature(visual, last(levels))


class TemporalEmbedding(nn.Module):
    """A learned vector for each frame, which is added to all its tokens and starts at 0."""

    def __init__(self, frames: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(1, frames, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps float [V, T, L, C] -> float [V, T, L, C]; interpolates the embedding for clips of another length."""
        embedding: Tensor = self.embedding
        if tokens.shape[1] != embedding.shape[1]:
            embedding = F.interpolate(embedding.mT, size=tokens.shape[1], mode="linear").mT
        return tokens + embedding.unsqueeze(2)


class ProjectedLevels(TowerPlugin):
    """A plug-in without layers that reads all tokens after K blocks in the space of the texts: [V, T, K, 1+L, D]."""

    def __init__(self, visual: Any, blocks: Sequence[int] | None) -> None:
        """Stores the numbers of the K blocks, counted from 1; None: the last block of each third.

        Raises:
            UserError: the tower does not have these blocks.
        """
        super().__init__(visual)
        last_block = len(visual.transformer.resblocks)
        thirds = {max(1, round(last_block * part / 3)) for part in (1, 2, 3)}
        self.blocks = sorted(thirds if blocks is None else set(blocks))
        if outside := [number for number in self.blocks if not 1 <= number <= last_block]:
            raise UserError(
                f"MODEL.TAPS contains {outside[0]}, but the backbone has blocks 1 to {last_block}: use some of these, "
                "or null"
            )

    def read(self, visual: Any, levels: Iterator[Tensor]) -> Tensor:
        """Applies `ln_post` and the projection to all tokens; blocks after the last tap are not computed."""
        needed = enumerate(islice(levels, self.blocks[-1] + 1))
        chosen = [visual.ln_post(tokens) @ visual.proj for number, tokens in needed if number in self.blocks]
        return torch.stack(chosen, dim=2)


def each_frame(block: Any, tokens: Tensor) -> Tensor:
    """Applies a block of the tower to each frame: float [V, T, 1+L, C] or [V, T, C, h, w] -> its output."""
    return block(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])


def last(levels: Iterator[Tensor]) -> Tensor:
    """Returns the tokens after the last block, without keeping the others."""
    return deque(levels, maxlen=1).pop()


def clip_feature(visual: Any, tokens: Tensor) -> Tensor:
    """Returns CLIP's feature of each frame from the last level: float [V, T, 1+L, C] -> float [V, T, D]."""
    return visual.ln_post(tokens)[:, :, 0] @ visual.proj


def tower_levels(visual: Any, frames: Tensor, plugin: TowerPlugin, recompute: bool) -> Iterator[Tensor]:
    """Yields the tokens of a tower with a plug-in, see `TowerPlugin.read`.

    Args:
        visual: open_clip's VisionTransformer.
        frames: float [V, T, 3, H, W].
        plugin: the plug-in of the tower.
        recompute: store only the input of each block, and recompute the rest in the backward pass.
    """
    patches = visual.conv1(frames.flatten(0, 1)).flatten(2).mT
    first = plugin.class_embedding(visual).to(patches.dtype).expand(patches.shape[0], 1, -1)
    tokens = torch.cat([first, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
    tokens = visual.ln_pre(plugin.before_blocks(tokens.unflatten(0, frames.shape[:2])))
    yield tokens
    yield from _levels_of_blocks(visual.transformer.resblocks, tokens, plugin, recompute)


def resnet_levels(visual: Any, frames: Tensor, plugin: TowerPlugin, recompute: bool) -> Iterator[Tensor]:
    """Yields the maps of torchvision's ResNet with a plug-in, float [V, T, C, h, w]; arguments as in `tower_levels`."""
    maps = visual.maxpool(visual.relu(visual.bn1(visual.conv1(frames.flatten(0, 1)))))
    maps = maps.unflatten(0, frames.shape[:2])
    yield maps
    stages = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
    yield from _levels_of_blocks(stages, maps, plugin, recompute)


def _levels_of_blocks(blocks: Iterable[Any], level: Tensor, plugin: TowerPlugin, recompute: bool) -> Iterator[Tensor]:
    for number, block in enumerate(blocks, start=1):
        if recompute:
            level = checkpoint(plugin.block, number, block, level, use_reentrant=False)
        else:
            level = plugin.block(number, block, level)
        yield level
