"""The frame encoders of methods without text: ImageNet's ResNets through torchvision, or a CLIP image tower alone.

See `models.frame_tower` for the shapes.
"""

import http.client
import sys
import urllib.request
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from models.frame_tower import FrameTower
from utils.checkpoint import check_archive
from utils.errors import UserError, reason_of
from utils.lfs import refuse_lfs_pointer
from utils.schema import ModelOptions
from utils.weights import load_exactly, raise_if_not_finite, read_weights

RESNETS = ("resnet18", "resnet34", "resnet50")
# The first of torchvision's sets of weights, which all published few-shot baselines use.
IMAGENET_WEIGHTS = "IMAGENET1K_V1"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSIFIER = "fc."  # the head for ImageNet's 1000 classes, not used
LAYERS_OF_MAPS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
SERVER_ANSWERS_WITHIN = 10.0  # seconds


class FrameEncoderOptions(ModelOptions):
    """The `MODEL` keys of a method that needs features of frames and no text."""

    BACKBONE: str = Field(
        "resnet50", min_length=1, description=f"{', '.join(RESNETS)} (ImageNet), or CLIP: tiny, RN50, ViT-B/16, ..."
    )
    WEIGHTS: str = Field(
        "imagenet", min_length=1, description="of a ResNet: imagenet, path of a .pth file, or random; CLIP_WEIGHTS else"
    )


class ImageNetResNet(FrameTower):
    """A ResNet up to its global average pooling, trainable; its features are 512 wide, or 2048 for resnet50."""

    pixel_mean, pixel_std = IMAGENET_MEAN, IMAGENET_STD  # what torchvision's weights were trained with

    def __init__(self, options: FrameEncoderOptions) -> None:
        """Builds the network and loads its weights.

        Args:
            options: reads BACKBONE, one of RESNETS, WEIGHTS, and what `FrameTower` reads.

        Raises:
            UserError: the weights are missing or unreadable.
        """
        from torchvision.models import get_model  # imported late, as it takes seconds

        visual: Any = get_model(options.BACKBONE, weights=None)
        width: int = visual.fc.in_features
        visual.fc = nn.Identity()
        if options.WEIGHTS != "random":
            _load_weights(visual, options.BACKBONE, _weights_file(options))
        super().__init__(visual, options)
        self.width = width

    def drop_pooling(self) -> int:
        """See `FrameTower`; no trained layer follows the maps."""
        return self.width

    def image_maps(self, images: Tensor) -> Tensor:
        """See `FrameTower`."""
        maps = images
        for name in LAYERS_OF_MAPS:
            maps = getattr(self.visual, name)(maps)
        return maps


def frame_encoder(options: FrameEncoderOptions, image_size: int) -> FrameTower:
    """Returns the encoder that BACKBONE names.

    Args:
        options: reads BACKBONE, WEIGHTS or the CLIP keys, and what `FrameTower` reads.
        image_size: height and width of the frames in pixels; the ResNets accept any.

    Raises:
        UserError: unknown backbone, or its weights are missing or unreadable.
    """
    if options.BACKBONE in RESNETS:
        return ImageNetResNet(options)
    if options.BACKBONE.lower().startswith("resnet"):
        raise UserError(
            f"MODEL.BACKBONE: {options.BACKBONE!r} is not one of the ImageNet backbones {', '.join(RESNETS)}; "
            f"CLIP's own ResNets are called RN50, RN101, ..."
        )
    from models.clip_fsar import ClipTowers  # imported late, as open_clip takes seconds

    towers = ClipTowers(options, image_size)
    towers.drop_text_tower()
    return towers


def _weights_file(options: FrameEncoderOptions) -> Path:
    """The file that WEIGHTS names, downloaded if it is ImageNet's and not in torchvision's cache."""
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
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # the last: torch found another hash
        raise UserError(
            f"MODEL.WEIGHTS: the ImageNet weights of {backbone} are not in {path.parent} and could not be downloaded "
            f"({reason_of(error)}); get {name} from {url} on a machine with a network and put it there, or anywhere "
            f"and set MODEL.WEIGHTS=/path/to/{name}; MODEL.WEIGHTS=random needs no file"
        ) from error
    return path


def _download(url: str, path: Path) -> None:
    """Downloads a file whose name ends in its hash, as torchvision's do.

    A request with a time limit comes first: torch's download has none and would hang on a dead network.
    """
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SERVER_ANSWERS_WITHIN):
        path.parent.mkdir(parents=True, exist_ok=True)
    hash_prefix = path.stem.rpartition("-")[2]
    torch.hub.download_url_to_file(url, str(path), hash_prefix, progress=sys.stderr.isatty())


def _load_weights(network: nn.Module, backbone: str, path: Path) -> None:
    """Loads torchvision's state dict, with or without ImageNet's classifier."""
    refuse_lfs_pointer(path)
    try:
        check_archive(path)
        state = {key: value for key, value in read_weights(path).items() if not key.startswith(CLASSIFIER)}
        raise_if_not_finite(state, f"MODEL.WEIGHTS: {path}", "copy the file again or name another one")
        load_exactly(network, state)
    except UserError:
        raise
    except Exception as error:  # a wrong file can fail in as many ways as there are formats
        raise UserError(
            f"MODEL.WEIGHTS: {path} does not hold torchvision's state dict of {backbone} ({reason_of(error)}); set "
            f"MODEL.BACKBONE to what it was saved from, name another file, or remove it if it is a broken download"
        ) from error
