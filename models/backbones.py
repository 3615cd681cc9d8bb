"""Frame encoders for methods without text: torchvision's ImageNet networks, or only the image tower of CLIP.

See `models.frame_tower` for the shapes.
"""

import http.client
import sys
import urllib.request
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from models.adapters import AdapterChoice
from models.base import FewShotModel
from models.frame_tower import FrameTower
from models.released import SEQUENTIAL_RESNET
from utils.checkpoint import check_archive
from utils.errors import UserError, reason_of
from utils.files import raise_if_lfs_pointer
from utils.schema import ModelOptions
from utils.weights import load_exactly, raise_if_not_finite, read_weights

RESNETS = ("resnet18", "resnet34", "resnet50")
VIT = "vit_b_16"
ENCODERS = (*RESNETS, VIT)
VIT_PATCH = 16  # pixels
VIT_POSITIONS = "encoder.pos_embedding"
# The first version of torchvision's weights, which all published few-shot baselines use.
IMAGENET_WEIGHTS = "IMAGENET1K_V1"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSIFIERS = ("fc.", "heads.", "9.")  # the unused ImageNet classifier; "9." if the layers are in a Sequential
LAYERS_OF_MAPS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
SERVER_TIMEOUT = 10.0  # seconds


class FrameEncoderOptions(ModelOptions):
    """The `MODEL` keys of a method that needs features of frames and no text."""

    BACKBONE: str = Field(
        "resnet50",
        min_length=1,
        description=f"{', '.join(ENCODERS)} (ImageNet), or CLIP: tiny, tiny-vit, RN50, ViT-B/16, ...",
    )
    WEIGHTS: str = Field(
        "imagenet",
        min_length=1,
        description="weights of an ImageNet backbone: imagenet, path of a .pth file, or random (CLIP: CLIP_WEIGHTS)",
    )
    STRIDE_IN_1X1: bool = Field(
        False,
        description="resnet50: stride in the first 1x1 convolution of a block, as in weights from Keras or Caffe",
    )


class ImageNetResNet(FrameTower):
    """A trainable ResNet up to its global average pooling; its features are 512 wide, or 2048 for resnet50."""

    pixel_mean, pixel_std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, options: FrameEncoderOptions) -> None:
        """Builds the network and loads its weights.

        Args:
            options: provides BACKBONE (one of RESNETS), WEIGHTS and the options of `FrameTower`.

        Raises:
            UserError: the weights are missing or unreadable.
        """
        from torchvision.models import get_model  # imported late, as it takes seconds

        visual: Any = get_model(options.BACKBONE, weights=None)
        width: int = visual.fc.in_features
        visual.fc = nn.Identity()
        if options.WEIGHTS != "random":
            _load_weights(visual, options.BACKBONE, _weights_file(options))
        if options.STRIDE_IN_1X1:
            _move_strides(visual)
        super().__init__(visual, options)
        self.width = width

    def _drop_pooling(self) -> int:
        """See `FrameTower`; no trained layer follows the maps."""
        return self.width

    def image_maps(self, images: Tensor) -> Tensor:
        """See `FrameTower`."""
        maps = images
        for name in LAYERS_OF_MAPS:
            maps = getattr(self.visual, name)(maps)
        return maps


class ImageNetViT(FrameTower):
    """A trainable vit_b_16 of torchvision up to its class token; its features are 768 wide."""

    pixel_mean, pixel_std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, options: FrameEncoderOptions, image_size: int) -> None:
        """Builds the network and loads its weights; positions are interpolated if the frames are not 224 x 224.

        Args:
            options: see `ImageNetResNet`.
            image_size: height and width of the frames in pixels.

        Raises:
            UserError: the frames cannot be cut into patches, or the weights are missing or unreadable.
        """
        from torchvision.models import get_model  # imported late, as it takes seconds

        if image_size % VIT_PATCH:
            raise UserError(
                f"DATA.IMG_SIZE is {image_size}, but {VIT} cuts frames into patches of {VIT_PATCH} x {VIT_PATCH} "
                f"pixels: set it to a multiple of {VIT_PATCH}"
            )
        visual: Any = get_model(options.BACKBONE, weights=None, image_size=image_size)
        visual.heads = nn.Identity()
        if options.WEIGHTS != "random":
            _load_weights(visual, options.BACKBONE, _weights_file(options))
        super().__init__(visual, options)
        self.width: int = visual.hidden_dim

    def _drop_pooling(self) -> int:
        """See `FrameTower`; no trained layer follows the patches."""
        return self.width

    def image_maps(self, images: Tensor) -> Tensor:
        """See `FrameTower`: the patches of the last layer, normalised, without the class token."""
        visual: Any = self.visual
        patches = visual.conv_proj(images)
        rows, columns = patches.shape[-2:]
        tokens = torch.cat([visual.class_token.expand(images.shape[0], -1, -1), patches.flatten(2).mT], dim=1)
        return visual.encoder(tokens)[:, 1:].mT.unflatten(-1, (rows, columns))


class FrameMethod(FewShotModel):
    """Base class of the methods that begin with the feature of each frame and use no text.

    Attributes:
        encoder: the image network; `encoder.width` is D.
        adapter: the adapter of MODEL.ADAPTER, or None.
    """

    Options: ClassVar[type[ModelOptions]] = FrameEncoderOptions

    def __init__(self, options: FrameEncoderOptions, image_size: int) -> None:
        """See `frame_encoder`."""
        super().__init__()
        self.encoder = frame_encoder(options, image_size)
        self.adapter = options.attach_adapter(self.encoder, image_size) if isinstance(options, AdapterChoice) else None
        self.pixel_mean, self.pixel_std = self.encoder.pixel_mean, self.encoder.pixel_std

    def encode(self, frames: Tensor) -> Tensor:
        """Returns the feature of each frame: float [V, T, 3, H, W] -> float [V, T, D]."""
        return self.encoder(frames)


def frame_encoder(options: FrameEncoderOptions, image_size: int, with_text: bool = False) -> FrameTower:
    """Returns the encoder of BACKBONE.

    Args:
        options: provides BACKBONE, WEIGHTS or the CLIP keys, and the options of `FrameTower`.
        image_size: height and width of the frames in pixels; the ResNets accept any, the ViT multiples of 16.
        with_text: whether the method needs CLIP's text tower.

    Raises:
        UserError: the backbone is unknown or has no text tower, or its weights are missing or unreadable.
    """
    if with_text and options.BACKBONE in ENCODERS:
        raise UserError(
            f"MODEL.BACKBONE: {options.BACKBONE} has no text tower, which the text options of {options.NAME} need; use "
            "one of CLIP's (RN50, ViT-B/16, ...) or switch the text off"
        )
    if options.STRIDE_IN_1X1 and options.BACKBONE != "resnet50":
        raise UserError(
            f"MODEL.STRIDE_IN_1X1 is true but MODEL.BACKBONE is {options.BACKBONE}; weights of both kinds exist for "
            "resnet50 alone: set MODEL.STRIDE_IN_1X1 to false"
        )
    if options.BACKBONE in RESNETS:
        return ImageNetResNet(options)
    if options.BACKBONE == VIT:
        return ImageNetViT(options, image_size)
    if options.BACKBONE.lower().startswith(("resnet", "vit_")):
        raise UserError(
            f"MODEL.BACKBONE: {options.BACKBONE!r} is not one of the ImageNet backbones {', '.join(ENCODERS)}; "
            f"CLIP's are called RN50, RN101, ViT-B/16, ..."
        )
    from models.clip_fsar import ClipTowers  # imported late, as open_clip takes seconds

    towers = ClipTowers(options, image_size)
    if not with_text:
        towers.drop_text_tower()
    return towers


def _move_strides(resnet: nn.Module) -> None:
    """Moves the stride of each block from its 3x3 convolution to the 1x1 before it; no weight changes."""
    for module in resnet.modules():
        first, second = getattr(module, "conv1", None), getattr(module, "conv2", None)
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d):
            first.stride, second.stride = second.stride, first.stride


def _weights_file(options: FrameEncoderOptions) -> Path:
    """Returns the file of WEIGHTS; downloads ImageNet weights that torchvision's cache does not contain."""
    if options.WEIGHTS == "imagenet":
        return _imagenet_file(options.BACKBONE)
    path = Path(options.WEIGHTS).expanduser()
    if not path.is_file():
        raise UserError(
            f"MODEL.WEIGHTS: {options.WEIGHTS!r} is neither imagenet nor random nor a file; "
            f"give the path of a state dict saved from torchvision's {options.BACKBONE}"
        )
    return path


def _imagenet_file(backbone: str) -> Path:
    from torchvision.models import get_model_weights

    url = get_model_weights(backbone)[IMAGENET_WEIGHTS].url
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    try:
        _download(url, path)
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: the hash differs
        raise UserError(
            f"MODEL.WEIGHTS: the ImageNet weights of {backbone} are not in {path.parent} and could not be downloaded "
            f"({reason_of(error)}); get {name} from {url} on a machine with a network and put it there, or anywhere "
            f"and set MODEL.WEIGHTS=/path/to/{name}; MODEL.WEIGHTS=random needs no file"
        ) from error
    return path


def _download(url: str, path: Path) -> None:
    """Downloads a file whose name ends in its hash, as torchvision's do.

    A request with a timeout comes first, since torch's download has no timeout and would hang on a dead network.
    """
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SERVER_TIMEOUT):
        path.parent.mkdir(parents=True, exist_ok=True)
    hash_prefix = path.stem.rpartition("-")[2]
    torch.hub.download_url_to_file(url, str(path), hash_prefix, progress=sys.stderr.isatty())


def _load_weights(network: nn.Module, backbone: str, path: Path) -> None:
    """Loads torchvision's state dict, or that of a Sequential of its layers, with or without ImageNet's classifier."""
    raise_if_lfs_pointer(path)
    try:
        check_archive(path)
        state = {key: value for key, value in read_weights(path).items() if not key.startswith(CLASSIFIERS)}
        raise_if_not_finite(state, f"MODEL.WEIGHTS: {path}", "copy the file again or use another one")
        load_exactly(network, _fitted(state, network))
    except UserError:
        raise
    except Exception as error:  # a wrong file can raise many types of errors
        raise UserError(
            f"MODEL.WEIGHTS: {path} does not contain torchvision's state dict of {backbone} ({reason_of(error)}); set "
            f"MODEL.BACKBONE to the model that it was saved from, use another file, or remove a broken download"
        ) from error


def _fitted(state: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Returns the weights under torchvision's names, with a ViT's positions interpolated to the image size."""
    names = {str(number): name for number, name in SEQUENTIAL_RESNET.items()}
    if all(key.partition(".")[0] in names for key in state):
        state = {names[key.partition(".")[0]] + "." + key.partition(".")[2]: value for key, value in state.items()}
    if VIT_POSITIONS in state:
        from torchvision.models.vision_transformer import interpolate_embeddings

        state = dict(interpolate_embeddings(network.image_size, network.patch_size, OrderedDict(state)))
    return state
