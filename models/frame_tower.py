"""Base class of all backbones: selects the trained parts, and applies settings for speed and memory.

Shapes: V videos, T frames, h x w positions of a feature map, D feature width.
"""

import functools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.tiny_clip import LAYERS_OF_A_BLOCK, TinyImageTower
from models.tower_plugin import TowerPlugin, resnet_levels, tower_levels
from utils.errors import UserError, counted
from utils.schema import HEAD_ONLY, LAST_BLOCKS, ModelOptions

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
STAGES = ("layer1", "layer2", "layer3", "layer4")  # in CLIP's and in torchvision's ResNets
Part = nn.Module | nn.Parameter
Plugin = TypeVar("Plugin", bound=TowerPlugin)

logger = logging.getLogger(__name__)


class FrameTower(nn.Module, ABC):
    """An image network that encodes every frame separately.

    Attributes:
        visual: the network; MODEL.TRAINABLE selects the trained parts.
        width: D, the length of one frame's feature.
        pixel_mean, pixel_std: normalisation of the pixels that the weights expect.
    """

    visual: nn.Module
    width: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]

    def __init__(self, visual: nn.Module, options: ModelOptions) -> None:
        """Wraps a network whose weights are loaded.

        Args:
            visual: the network.
            options: provides BACKBONE, FREEZE_BN, TRAINABLE, ACTIVATION_CHECKPOINTING, COMPILE.

        Raises:
            UserError: the network has fewer blocks than TRAINABLE requires, or an unknown architecture.
        """
        super().__init__()
        # A ResNet's convolutions are faster in the channels-last format: much faster on GPUs, slightly on CPUs.
        self.visual = visual.to(memory_format=torch.channels_last) if _is_resnet(visual) else visual
        self.freeze_batch_norm = options.FREEZE_BN
        self._options = options
        self._plugin: list[TowerPlugin] = []  # not a child module, since the method owns it
        self._frozen = _parts_to_freeze(visual, options)
        for part in self._frozen:
            part.requires_grad_(False)
        if options.ACTIVATION_CHECKPOINTING:
            for unit in _units_to_recompute(visual, options):
                # Set on the instance, not wrapped around it, so that the names of the weights do not change.
                unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)
        if options.COMPILE:
            _log_compile_times()
            # Functions are compiled, not the module, whose name in checkpoints would change.
            self.image_features = torch.compile(self.image_features)  # type: ignore[method-assign]
            self.image_maps = torch.compile(self.image_maps)  # type: ignore[method-assign]

    def attach(self, build: Callable[[Any], Plugin], on_resnets: bool = False) -> Plugin:
        """Attaches the plug-in of a method, which all later calls of `forward` use.

        Args:
            build: builds the plug-in from `visual`, an open_clip VisionTransformer or torchvision's ResNet.
            on_resnets: the plug-in's attribute of this name.

        Returns:
            the plug-in, which the method stores as an attribute.

        Raises:
            UserError: the tower does not support plug-ins, or an option excludes them.
        """
        _check_plugin_support(self.visual, self._options, on_resnets)
        plugin = build(self.visual)
        self._plugin = [plugin]
        self.width = plugin.width
        if self._options.ACTIVATION_CHECKPOINTING:
            for unit in _units_to_recompute(self.visual, self._options):
                del unit.forward  # checkpointing recomputes the block together with the plug-in's layers
        return plugin

    def forward(self, frames: Tensor) -> Tensor:
        """Returns the features of every frame: float [V, T, 3, H, W] -> float [V, T, D]."""
        if self._plugin:
            (plugin,) = self._plugin
            levels = resnet_levels if plugin.on_resnets else tower_levels
            recompute = self._options.ACTIVATION_CHECKPOINTING
            return plugin.read(self.visual, levels(self.visual, frames, plugin, recompute))
        features = self.image_features(rearrange(frames, "v t c h w -> (v t) c h w"))
        return rearrange(features, "(v t) d -> v t d", v=frames.shape[0])

    def feature_maps(self, frames: Tensor) -> Tensor:
        """Returns the output of the last block at each position: [V, T, 3, H, W] -> [V, T, h, w, width of the maps].

        Call `drop_pooling` first; it raises UserError for towers without maps.
        """
        maps = self.image_maps(rearrange(frames, "v t c h w -> (v t) c h w"))
        return rearrange(maps, "(v t) d h w -> v t h w d", v=frames.shape[0])

    def image_features(self, images: Tensor) -> Tensor:
        """Maps float [V*T, 3, H, W] -> float [V*T, D]."""
        return self.visual(images)

    @abstractmethod
    def image_maps(self, images: Tensor) -> Tensor:
        """Maps float [V*T, 3, H, W] -> float [V*T, width of the maps, h, w]."""

    def drop_pooling(self) -> int:
        """Drops the layers after the feature maps, for methods that pool the maps themselves.

        Otherwise these layers would get no gradient. Only `feature_maps` can be called afterwards.

        Returns:
            the width of the maps' features.

        Raises:
            UserError: the maps of this tower are unknown, or it has a plug-in, which the maps would bypass.
        """
        if self._plugin:
            raise UserError(
                f"MODEL.ADAPTER is {getattr(self._options, 'ADAPTER', 'set')}, but {self._options.NAME} pools the "
                "feature maps of the backbone itself, which adapters are not part of: set MODEL.ADAPTER to none"
            )
        return self._drop_pooling()

    @abstractmethod
    def _drop_pooling(self) -> int:
        """See `drop_pooling`."""

    def train(self, mode: bool = True) -> "FrameTower":
        """Sets training mode; frozen parts stay in evaluation mode, and with FREEZE_BN also all batch norms.

        A batch norm in evaluation mode uses its loaded statistics unchanged; its weights may still be trained.
        """
        super().train(mode)
        for part in self._frozen:
            if isinstance(part, nn.Module):
                part.eval()
        if self.freeze_batch_norm:
            for module in self.visual.modules():
                if isinstance(module, BATCH_NORMS):
                    module.eval()
        return self


# --- trained parts ----------------------------------------------------------------------------------------


def _is_resnet(visual: nn.Module) -> bool:
    """Returns whether the network is CLIP's or torchvision's ResNet, by attributes: importing both takes seconds."""
    return all(hasattr(visual, name) for name in STAGES)


def _is_vit(visual: nn.Module) -> bool:
    """Returns whether the network is CLIP's vision transformer."""
    return hasattr(visual, "transformer") and hasattr(visual, "ln_pre")


def _is_torchvision_vit(visual: nn.Module) -> bool:
    """Returns whether the network is torchvision's vision transformer."""
    return hasattr(visual, "conv_proj") and hasattr(visual, "class_token")


def _parts_to_freeze(visual: nn.Module, options: ModelOptions) -> list[Part]:
    """Returns the parts that TRAINABLE freezes: none, all, or the stem and all but the last N blocks."""
    if options.TRAINABLE == HEAD_ONLY:
        return [visual]
    last = LAST_BLOCKS.fullmatch(options.TRAINABLE)
    if not last:
        return []
    stem, blocks = _stem_and_blocks(visual, options)
    trained = int(last[1])
    if trained > len(blocks):
        raise UserError(
            f"MODEL.TRAINABLE is {options.TRAINABLE}, but {options.BACKBONE} has {counted(len(blocks), 'block')}: "
            f"set it to last_{len(blocks)} or less, or to all"
        )
    return [*stem, *blocks[: len(blocks) - trained]]


def _stem_and_blocks(visual: Any, options: ModelOptions) -> tuple[list[Part], list[nn.Module]]:
    """Returns the layers before the first block, and the blocks in order; all other layers follow the last block.

    A block of a ViT is one transformer layer, that of a ResNet one of its four stages, that of the tiny tower one
    convolution with its batch norm.
    """
    stem: list[Part] = []
    if _is_vit(visual):
        stem = [visual.conv1, visual.class_embedding, visual.positional_embedding, visual.patch_dropout, visual.ln_pre]
        return stem, list(visual.transformer.resblocks)
    if _is_torchvision_vit(visual):
        return [visual.conv_proj, visual.class_token, visual.encoder.pos_embedding], list(visual.encoder.layers)
    if _is_resnet(visual):
        stem = [layer for name, layer in visual.named_children() if name.startswith(("conv", "bn"))]
        return stem, [getattr(visual, name) for name in STAGES]
    if isinstance(visual, TinyImageTower):
        layers = visual.convolutions
        return stem, [layers[i : i + LAYERS_OF_A_BLOCK] for i in range(0, len(layers), LAYERS_OF_A_BLOCK)]
    raise _unknown_blocks("MODEL.TRAINABLE", options.TRAINABLE, options)


def _units_to_recompute(visual: Any, options: ModelOptions) -> list[nn.Module]:
    """Returns the parts that keep only their input if checkpointed: transformer layers, bottlenecks of a ResNet."""
    if isinstance(visual, TinyImageTower):
        return [visual.convolutions]
    if _is_vit(visual):
        return list(visual.transformer.resblocks)
    if _is_torchvision_vit(visual):
        return list(visual.encoder.layers)
    if _is_resnet(visual):
        return [unit for name in STAGES for unit in getattr(visual, name)]
    raise _unknown_blocks("MODEL.ACTIVATION_CHECKPOINTING", "true", options)


def _unknown_blocks(key: str, value: str, options: ModelOptions) -> UserError:
    return UserError(
        f"{key} is {value}, but the blocks of {options.BACKBONE} are not known, only those of tiny, CLIP's ResNets and "
        f"ViTs and the ImageNet backbones; set {key} to its default"
    )


def _check_plugin_support(visual: Any, options: ModelOptions, on_resnets: bool) -> None:
    """Raises UserError if the tower or an option does not work with a plug-in."""
    is_clip_vit = _is_vit(visual) and visual.attn_pool is None and visual.pool_type == "tok"
    is_torchvision_resnet = _is_resnet(visual) and hasattr(visual, "maxpool")
    if not (is_torchvision_resnet if on_resnets else is_clip_vit):
        raise UserError(
            f"MODEL.BACKBONE is {options.BACKBONE}, but {options.NAME} adds layers to CLIP's vision transformers: set "
            "MODEL.BACKBONE to ViT-B/16, another ViT of OpenAI, or tiny-vit"
        )
    if options.COMPILE:
        raise UserError(
            f"MODEL.COMPILE is true, but a backbone with the layers that {options.NAME} adds is not compiled: set "
            "MODEL.COMPILE to false"
        )


# --- compiling --------------------------------------------------------------------------------------------


@functools.cache
def _log_compile_times() -> None:
    """Logs the time of each compilation, which the first batch in training and in evaluation trigger."""
    from torch._dynamo.callback import on_compile_end, on_compile_start  # imported late, as it takes seconds

    started: list[float] = []

    def note_start(_: Any) -> None:
        started.append(time.perf_counter())

    def log_end(_: Any) -> None:
        logger.info("compiled the backbone in %.1f s", time.perf_counter() - started.pop())

    on_compile_start(note_start)
    on_compile_end(log_end)
