"""Features on disk, which one run computes and later runs read.

FeatureCache    TEST.FEATURE_CACHE: the backbone's features of all videos of a split
ClassTexts      text features of classes, kept for every command
FeatureFile     one file of either, with its lock
describe_encoding, data_digest, ...    the key in the name of a file: everything that its features depend on
"""

import contextlib
import functools
import hashlib
import inspect
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from episodes.dataset import ClipReader
from episodes.packed import PACKED_SUFFIX
from episodes.splits import SplitIndex
from models.base import FewShotModel
from models.frame_tower import FrameTower
from models.text import check_class_texts
from run import stopping
from run.encoder import BackboneEncoder, Encoder
from run.features import FeatureBank, encode_videos, rows_of
from utils import distributed
from utils.checkpoint import file_digest
from utils.errors import UserError
from utils.files import cache_folder, exclusive
from utils.schema import Config
from utils.utils import device_name, package_versions

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
BACKBONE_KEYS = ("BACKBONE", "QUICK_GELU", "COMPILE")
CLIP_KEYS = ("SEQ_LEN", "IMG_SIZE", "SHORT_SIDE", "IMG_NORM")  # not SAMPLING, which only affects training clips
READING_CODE = ("episodes/**/*.py",)
TEXT_CODE = ("models/**/*.py",)  # between a class and its text feature
VIDEO_CODE = (*READING_CODE, *TEXT_CODE, "videotransforms/**/*.py", "run/encoder.py", "run/features.py")
SECONDS_BETWEEN_LOOKS = 0.5  # while another run computes the same features


class FeatureCache:
    """The folder TEST.FEATURE_CACHE, with one file for each split, backbone and kind of clip.

    The matcher and the head are not part of the key, so methods on the same backbone share a file. No file is deleted.
    """

    def __init__(self, config: Config) -> None:
        """Creates the folder; raises UserError if that fails, before any work is done."""
        self.folder, self.config = Path(config.TEST.FEATURE_CACHE), config
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"TEST.FEATURE_CACHE: cannot create the folder {self.folder}: {error.strerror}; choose another one"
            ) from error

    def bank(self, encoder: BackboneEncoder, index: SplitIndex, reader: ClipReader) -> FeatureBank:
        """Returns the backbone's features of all videos of a split, read from the folder or encoded."""
        content = distributed.from_main(
            lambda: {**describe_encoding(self.config, encoder), "videos": data_digest(index)}
        )
        file, videos = FeatureFile(self.folder, index.split, content), range(len(index))
        # Not `bank_memory`, which all processes call together.
        allocate = file.allocate if distributed.is_main() else partial(torch.empty, device=encoder.device)
        features = file.read_or(lambda: encode_videos(encoder, index, videos, reader, allocate).features)
        return FeatureBank(features, rows_of(videos, len(index)))

    def encode_videos(
        self, encoder: Encoder, index: SplitIndex, videos: Sequence[int], reader: ClipReader
    ) -> FeatureBank:
        """Returns the same as `run.features.encode_videos`, with the backbone's features from the folder."""
        backbone = BackboneEncoder(encoder.model, encoder.device, encoder.mean is not None, encoder.amp)
        bank = self.bank(backbone, index, reader)
        return bank.map(lambda _, features: encoder.finish(features), videos, encoder.device)


class ClassTexts:
    """The text features of one model, kept in `cache_folder()`; the weights of the model must not change."""

    def __init__(self, model: FewShotModel) -> None:
        """Stores a model; its `class_text` computes the features, and its `text_source` names their origin."""
        self.model, self.device = model, next(model.parameters()).device
        self._weights = ""  # digest of the text tower, once it is known

    def features(self, prompts: Mapping[str, str], source: str) -> Tensor:
        """Returns the text features of C classes, read or computed, float32 [C, D]; see `check_class_texts`."""
        features = self._kept(list(prompts.values()))
        check_class_texts(self.model, prompts, source, features)
        return features

    def _kept(self, prompts: Sequence[str]) -> Tensor:
        """Returns the features of C classes, float32 [C, D], read or computed; all processes call this together."""
        content = self.describe(prompts)
        if content is None:
            return self.model.class_text(prompts)
        file = FeatureFile(cache_folder(), "texts", content)

        def computed() -> Tensor:
            features = self.model.class_text(prompts)
            return file.allocate(features.shape).copy_(features) if distributed.is_main() else features

        return file.read_or(computed, logging.DEBUG).to(self.device, copy=True)

    def describe(self, prompts: Sequence[str]) -> dict[str, Any] | None:
        """Returns everything that `class_text` depends on, as plain values, or None if unknown."""
        source, file = self.model.text_source(prompts), source_file(self.model)
        if source is None or file is None:
            return None
        weights, values = source
        self._weights = self._weights or tensors_digest(weights)
        computed_by = type(self.model).class_text
        return {
            **values,
            "function": f"{computed_by.__module__}.{computed_by.__qualname__}",
            "weights": self._weights,
            "device": device_name(self.device),
            "code": files_digest(TEXT_CODE, file),
            "versions": package_versions(),
        }


# --- one file ---------------------------------------------------------------------------------------------


class FeatureFile:
    """Features in NAME.npy, float32 [V, ...], and in NAME.json their checksum and everything that they depend on."""

    def __init__(self, folder: Path, name: str, content: dict[str, Any]) -> None:
        self.content = content
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"features_{name}_{digest[:24]}.npy"
        # Other runs may write the same file. A run that is killed leaves its .part file behind.
        self.temporary = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.part")

    def read_or(self, compute: Callable[[], Tensor], level: int = logging.INFO) -> Tensor:
        """Returns the features from the file, or keeps and returns those that `compute` returns.

        Of runs that start together, one computes and the others wait. All processes call this together.

        Args:
            compute: writes the features to the tensor of `allocate` and returns them.
            level: of the log line that names a file that was read.
        """
        if (features := self._read_by_all(level)) is not None:
            return features
        with self._only_writer():
            if (features := self._read_by_all(level)) is not None:  # another run has written it in the meantime
                return features
            if self.path.exists():
                logger.warning("%s is damaged or belongs to other features: they are computed again", self.path)
            try:
                features = compute()
                self.keep()
            finally:
                with contextlib.suppress(OSError):
                    self.temporary.unlink()
        return features

    def _read_by_all(self, level: int) -> Tensor | None:
        """Returns `read()`, or None if one of the processes cannot read the file."""
        features = self.read()
        all_have = all(distributed.gather(features is not None))
        if features is None or not all_have:
            return None
        logger.log(level, "features read from %s", self.path)
        return features

    def read(self) -> Tensor | None:
        """Returns the memory-mapped features, or None if the file is missing, damaged, or contains other features."""
        try:
            if self.path.with_suffix(".json").read_bytes() != self._description(self.path):
                return None
        except OSError:
            return None
        return torch.from_numpy(np.load(self.path, mmap_mode="c"))  # copy on write: the file does not change

    @contextmanager
    def _only_writer(self) -> Iterator[None]:
        """Waits until no other run writes this file, with one log line; all processes call this together."""
        is_logged = False
        with contextlib.ExitStack() as lock:
            while reason := distributed.from_main(lambda: self._reason_to_wait(lock)):
                if not is_logged:
                    logger.info("another run computes the same features: %s", reason)
                    is_logged = True
                stopping.check()
                time.sleep(SECONDS_BETWEEN_LOOKS)
            yield

    def _reason_to_wait(self, lock: contextlib.ExitStack) -> str:
        """Takes the lock of the file and returns "", or returns which run has it."""
        try:
            lock.enter_context(exclusive(self.path.with_suffix(".lock"), f"the file {self.path}", "stop it"))
        except UserError as error:
            return str(error)
        except OSError:  # the folder is not writable, so the features cannot be kept either
            pass
        return ""

    def allocate(self, shape: Sequence[int]) -> Tensor:
        """Returns an uninitialised float32 tensor, mapped to the temporary file, or in memory if the disk is full."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            features = np.lib.format.open_memmap(self.temporary, "w+", np.float32, tuple(shape))
            if hasattr(os, "posix_fallocate"):  # if the disk filled up later, SIGBUS would kill the process
                with open(self.temporary, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, self.temporary.stat().st_size)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.temporary.unlink()
            self._warn_not_stored(error)
            return torch.empty(*shape)
        return torch.from_numpy(features)

    def keep(self) -> None:
        """Renames the temporary file, if there is one, to its final name; a failure is only a warning."""
        if not self.temporary.exists():
            return
        try:
            # Between these two lines `read` rejects an older file, since its checksum differs.
            self.path.with_suffix(".json").write_bytes(self._description(self.temporary))
            os.replace(self.temporary, self.path)
            logger.debug("features kept in %s", self.path)
        except OSError as error:
            self._warn_not_stored(error)

    def _description(self, path: Path) -> bytes:
        return json.dumps({**self.content, "sha256": file_digest(path)}, indent=1, sort_keys=True).encode()

    def _warn_not_stored(self, error: OSError) -> None:
        logger.warning("cannot write %s (%s); the features are not kept", self.path, error.strerror or error)


# --- the key: weights, code, settings, hardware, and the files of the videos ------------------------------


def describe_encoding(config: Config, encoder: BackboneEncoder) -> dict[str, Any]:
    """Returns everything that the features of a given clip depend on, as plain values.

    They include the features of a trial clip, which reflect options, precision, and the bits that this hardware
    computes. The digest of the weights covers those that the trial clip does not use.
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
        "device": encoder.device.type,
        "code": files_digest(VIDEO_CODE, source_file(encoder.model)),
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


def source_file(model: FewShotModel) -> Path | None:
    """Returns the file of a model's class, or None for a class from a notebook."""
    try:
        return Path(inspect.getfile(type(model)))
    except (TypeError, OSError):
        return None


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
        names = os.listdir(path)
        for folder in [name for name in names if os.path.isdir(path / name)]:  # such as rgb/, which may be a link
            names += [os.path.join(folder, name) for name in os.listdir(path / folder)]
        states = [(name, (path / name).stat()) for name in names if os.path.isfile(path / name)]
        return sorted((name, state.st_size, state.st_mtime_ns) for name, state in states)
    state = path.stat()
    return [("", state.st_size, state.st_mtime_ns)]
