"""The key of cached features: weights, code, settings, hardware, and the files of the videos."""

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from episodes.splits import SplitIndex
from models.base import FewShotModel
from models.frame_tower import FrameTower
from run.encoder import BackboneEncoder
from utils.schema import Config
from utils.utils import package_versions

ROOT = Path(__file__).resolve().parents[1]
BACKBONE_KEYS = ("BACKBONE", "QUICK_GELU", "COMPILE")
CLIP_KEYS = ("SEQ_LEN", "SAMPLING", "IMG_SIZE", "SHORT_SIDE", "IMG_NORM")
# The code between a video and its features.
CODE = ("models/**/*.py", "episodes/**/*.py", "videotransforms/**/*.py", "run/encoder.py", "run/features.py")


def describe_encoding(config: Config, encoder: BackboneEncoder, device: torch.device) -> dict[str, Any]:
    """Returns everything that the features of a given clip depend on, as plain values.

    This includes the features of a trial clip, which depend on everything besides the weights: options, precision,
    and the bits that this hardware computes. The digest of the weights covers what the trial clip does not reach.
    """
    size = config.DATA.IMG_SIZE
    noise = torch.Generator().manual_seed(0)
    clip = torch.randint(256, (1, config.DATA.SEQ_LEN, 3, size, size), dtype=torch.uint8, generator=noise)
    features, backbone = _trial(encoder, clip)
    return {
        "weights": tensors_digest(tensor for module in backbone for tensor in module.state_dict().values()),
        "trial": tensors_digest([features]),
        "backbone": {key: getattr(config.MODEL, key) for key in BACKBONE_KEYS},
        "clips": {key: getattr(config.DATA, key) for key in CLIP_KEYS},
        "device": device.type,
        "code": code_digest(encoder.model),
        "versions": package_versions(),
    }


@torch.no_grad()
def _trial(encoder: BackboneEncoder, clip: Tensor) -> tuple[Tensor, Sequence[nn.Module]]:
    """Returns the features of a clip, and the modules with the weights that they depend on.

    These are the model's frame towers, or the whole model if it has none or if one of its other layers runs too.
    """
    towers = [module for module in encoder.model.modules() if isinstance(module, FrameTower)]
    others = set(encoder.model.modules()).difference(*(tower.modules() for tower in towers))
    ran: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda module, _: ran.append(module)) for module in others]
    with torch.compiler.set_stance("force_eager"):  # one clip is not worth minutes of compiling
        features = encoder(clip)
    for hook in hooks:
        hook.remove()
    return features, [encoder.model] if ran or not towers else towers


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Returns the SHA-256 of types, shapes and values of tensors, in order; without names, which differ by method."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def code_digest(model: FewShotModel) -> str:
    """Returns the SHA-256 of the code between a video and its features, including the file of the model's class."""
    files = {path for pattern in CODE for path in ROOT.glob(pattern)}
    source = inspect.getsourcefile(type(model))
    digest = hashlib.sha256()
    for path in sorted(files | ({Path(source)} if source else set())):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def data_digest(index: SplitIndex) -> str:
    """Returns the SHA-256 of the paths of the videos and of the size and modification time of each file."""
    digest = hashlib.sha256(os.fsencode(index.root.resolve()))
    for video, path in enumerate(index.video_paths):
        digest.update(json.dumps([path, _file_states(index.path(video))]).encode())
    return digest.hexdigest()


def _file_states(path: Path) -> list[tuple[str, int, int]]:
    """Returns name, size in bytes and modification time of a video file, of the images of a folder, or of a store.

    The path of a video in a packed store continues below the path of the store's file.
    """
    if os.path.isdir(path):
        files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]  # rgb/ below it too
        states = [(os.path.relpath(file, path), file.stat()) for file in files]
        return sorted((name, state.st_size, state.st_mtime_ns) for name, state in states)
    file = next(place for place in (path, *path.parents) if os.path.exists(place))
    state = file.stat()
    return [("", state.st_size, state.st_mtime_ns)]
