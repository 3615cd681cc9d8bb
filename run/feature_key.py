"""The key of cached features: weights, code, settings, hardware, and the files of the videos."""

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from episodes.packed import PACKED_SUFFIX
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
READING_CODE = ("episodes/**/*.py",)
CODE = (*READING_CODE, "models/**/*.py", "videotransforms/**/*.py", "run/encoder.py", "run/features.py")


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

    The modules are the model's frame towers, or the whole model if it has none or if other layers run too.
    """
    towers = [module for module in encoder.model.modules() if isinstance(module, FrameTower)]
    others = set(encoder.model.modules()).difference(*(tower.modules() for tower in towers))
    ran: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda module, _: ran.append(module)) for module in others]
    with torch.compiler.set_stance("force_eager"):  # compiling would take minutes for one clip
        features = encoder(clip)
    for hook in hooks:
        hook.remove()
    return features, [encoder.model] if ran or not towers else towers


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Returns the SHA-256 of types, shapes and values of tensors, in order; not of names, which differ by method."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def code_digest(model: FewShotModel) -> str:
    """Returns the SHA-256 of the code between a video and its features, including the file of the model's class."""
    source = inspect.getsourcefile(type(model))
    return files_digest(CODE, Path(source) if source else None)


def files_digest(patterns: Sequence[str], another: Path | None = None) -> str:
    """Returns the SHA-256 of the files of this repository that match one of the patterns, and of another file."""
    files = {path for pattern in patterns for path in ROOT.glob(pattern)}
    digest = hashlib.sha256()
    for path in sorted(files | ({another} if another else set())):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def data_digest(index: SplitIndex) -> str:
    """Returns the SHA-256 of the paths of the videos and of the size and modification time of each file."""
    digest = hashlib.sha256(os.fsencode(index.root.resolve()))
    states_of_store = functools.cache(lambda store: _file_states(index.root / store))
    for path in index.video_paths:
        store = store_of(path)
        states = states_of_store(store) if store else _file_states(index.root / path)
        digest.update(json.dumps([path, states]).encode())
    return digest.hexdigest()


def store_of(video_path: str) -> str:
    """Returns the path of the packed store that contains a video of a split, or "" if the video is a file or folder."""
    store = os.path.dirname(os.path.dirname(video_path))
    return store if store.endswith(PACKED_SUFFIX) else ""


def _file_states(path: Path) -> list[tuple[str, int, int]]:
    """Returns name, size in bytes and modification time of a video file, of the images of a folder, or of a store."""
    if os.path.isdir(path):
        files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]  # rgb/ below it too
        states = [(os.path.relpath(file, path), file.stat()) for file in files]
        return sorted((name, state.st_size, state.st_mtime_ns) for name, state in states)
    state = path.stat()
    return [("", state.st_size, state.st_mtime_ns)]
