"""Released numbers in a folder: weights filled by a function of their names, episodes, outputs of the released head.

Two layouts are supported. The first: meta.json with `shapes[method]` and `params` for all methods together. The second:
meta_A.json or meta_B.json, next to the arrays or one folder above, with a section for each method in `methods`:
`shapes` (name -> shape of each entry of the released state dict), `params` (hyper-parameters), and how entries are
filled (`gain`, `plus_one`, `fill_scale`). In both, <method>.npz has for each episode <ep>: <ep>.support [N*K, T, *F],
<ep>.query [Q, T, *F], <ep>.classes [N], <ep>.sl [N*K], <ep>.ql [Q], and the outputs <ep>.eval.* and <ep>.train.*.
*F is (D,) for frame vectors, (D, h, w) for feature maps, or (3, H, W) for frames, as integers from 0 to 255 before
CLIP's normalisation. text_train and text_test [C, D] are the class texts of methods with text.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from einops import rearrange
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

import models
import models.backbones
import models.clip_fsar
from models.base import Episode, EpisodeLabels, FewShotModel
from models.frame_tower import FrameTower
from models.released import ReleasedNames, our_weights
from utils.checkpoint import load_weights
from utils.errors import UserError
from utils.schema import ModelOptions

META_FILES = ("meta.json", "meta_A.json", "meta_B.json")
BACKBONES = ((models.clip_fsar, "ClipTowers"), (models.backbones, "ImageNetResNet"))
COUNTERS = "num_batches_tracked"  # of batch norms; the fixtures do not contain them
Options = dict[str, Any]
Terms = dict[str, tuple[float | Tensor, float | Tensor]]  # name -> (ours, released)


class FakeTowers(nn.Module):
    """Replaces a backbone: the fixtures contain its frame vectors or feature maps, and this network returns them."""

    pixel_mean = pixel_std = (0.0, 0.0, 0.0)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, features: Tensor) -> Tensor:
        """Returns frame vectors [V, T, D], unchanged."""
        return features

    def feature_maps(self, maps: Tensor) -> Tensor:
        """Maps [V, T, D, h, w] -> [V, T, h, w, D], as in `FrameTower`."""
        return rearrange(maps, "v t d h w -> v t h w d")

    def drop_pooling(self) -> int:
        """Returns the width of the maps."""
        return self.width

    def drop_text_tower(self) -> None:
        """Does nothing."""


class SmallClip(FrameTower):
    """The frozen CLIP image tower of fixtures that begin with frames, filled as their `tower` describes."""

    pixel_mean = pixel_std = (0.0, 0.0, 0.0)  # the frames are already normalised

    def __init__(self, rule: Mapping[str, Any]) -> None:
        sizes = rule["tower"]
        width = sizes["width"]
        out = sizes["out"] if isinstance(sizes["out"], int) else width  # d2st does not use the projection
        visual = VisionTransformer(
            sizes["image"], sizes["patch"], width, sizes["layers"], sizes["heads"], 4.0, output_dim=out,
            act_layer=QuickGELU,
        )  # fmt: skip
        weights = {
            name: released_weight(f"visual.{name}", list(value.shape), rule)
            for name, value in visual.state_dict().items()
        }
        visual.load_state_dict(weights)
        super().__init__(visual, ModelOptions(BACKBONE="ViT-B/16", TRAINABLE="head"))
        self.width = visual.output_dim

    def image_maps(self, images: Tensor) -> Tensor:
        """Raises NotImplementedError, since no fixture needs maps of a tower."""
        raise NotImplementedError

    def _drop_pooling(self) -> int:
        """Raises NotImplementedError, since no fixture needs maps of a tower."""
        raise NotImplementedError

    def drop_text_tower(self) -> None:
        """Does nothing, since the fixtures contain the class texts."""


@dataclass(frozen=True)
class Head:
    """Description of one released head for the comparison.

    Attributes:
        name: name of the fixtures, and of our method unless `method` is set.
        scores: the name of the released scores, or a function (fixtures, episode, mode) -> float [Q, N].
        terms: (fixtures, episode, batched) -> the loss terms, ours and released, in training with dropout off.
        parameters: hyper-parameters in `params` that a score or a loss term depends on -> our options for them. The
            others are weights of the losses, whose terms are compared one by one, or belong to modules that are not
            used.
        options: further options that reproduce the released head.
        hidden: prefixes of entries -> ours, for the fixtures only: the released code does not save them in its
            checkpoints, or never reads them there, such as those of a classifier of training classes.
        backbone: builds the network that serves as the method's backbone.
        prepare: called with the model before its weights are loaded.
        from_tower: our entries that start as weights of CLIP's tower; the fixtures fill these under the tower's names.
    """

    name: str
    scores: "str | Callable[[Fixtures, str, str], Tensor]"
    terms: "Callable[[Fixtures, str, bool], Terms]"
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    hidden: Mapping[str, str] = field(default_factory=dict)
    method: str = ""
    backbone: "Callable[[Fixtures], nn.Module]" = lambda fixtures: FakeTowers(fixtures.width)
    prepare: "Callable[[FewShotModel, Fixtures], None]" = lambda model, fixtures: None
    from_tower: tuple[str, ...] = ()


class Fixtures:
    """The folder's numbers for one head."""

    def __init__(self, folder: Path, head: Head) -> None:
        try:
            self.meta_path, self.rule, self.parameters = find_meta(folder, head.name)
            self.shapes: dict[str, list[int]] = self.rule["shapes"]
            with np.load(folder / f"{head.name}.npz") as archive:
                self.arrays = {key: archive[key] for key in archive.files}
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{folder}: expected {', '.join(META_FILES[:-1])} or {META_FILES[-1]} with a section for {head.name}, "
                f"and {head.name}.npz of released numbers ({error})"
            ) from error
        self.folder = folder
        self.head = head
        self.options = merge(head.options, options_of(self.parameters, head))
        self.episodes = sorted(key.removesuffix(".support") for key in self.arrays if key.endswith(".support"))
        if not self.episodes:
            raise UserError(
                f"{folder}: {head.name}.npz contains no episode (no entry <ep>.support); use another folder"
            )
        self.width = self.tensor(f"{self.episodes[0]}.support").shape[2]
        self.given: set[str] = set()  # entries of our last model that the released head has no names for
        self._built: dict[str, FewShotModel] = {}

    def tensor(self, key: str) -> Tensor:
        """Returns one array as a float32 tensor; frames of integers are normalised for CLIP's towers."""
        if key not in self.arrays:
            raise UserError(
                f"{self.folder}: {self.head.name}.npz has no entry {key}; use a folder with complete episodes"
            )
        array = torch.as_tensor(self.arrays[key])
        return normalised_frames(array) if array.dtype == torch.uint8 else array.float()

    def labels(self, key: str) -> Tensor:
        """Returns one array of class numbers, int64."""
        return self.tensor(key).long()

    def value(self, key: str) -> float:
        """Returns one number."""
        return self.tensor(key).item()

    def scores(self, name: str, mode: str) -> Tensor:
        """Returns the released scores of an episode, float32 [1, Q, N]."""
        scores = self.head.scores
        values = self.tensor(f"{name}.{mode}.{scores}") if isinstance(scores, str) else scores(self, name, mode)
        return values.reshape(1, len(self.labels(f"{name}.ql")), len(self.labels(f"{name}.classes")))

    def texts(self, mode: str) -> Tensor:
        """Returns the class texts of a mode, float32 [C, D]; zeros [C, 1] for methods without text.

        With several templates [S, C, D], this is the selected one in training, and the mean otherwise.
        """
        key = "text_train" if mode == "train" else "text_test"
        if key in self.arrays:
            texts = self.tensor(key)
            picked = self.parameters.get("train_template_picked")
            if texts.ndim == 3:
                return texts[picked] if mode == "train" else texts.mean(dim=0)
            return texts
        return torch.zeros(self.parameters.get("num_class", 12), 1)

    def build(self, **options: object) -> FewShotModel:
        """Returns the head with the released weights and the hyper-parameters of the folder, in evaluation mode."""
        merged = merge(self.options, options)
        key = json.dumps(merged, sort_keys=True)
        if key not in self._built:
            self._built[key] = self._build(merged)
        return self._built[key]

    def _build(self, options: Options) -> FewShotModel:
        backbone = self.head.backbone(self)
        model = build_head(self.head.method or self.head.name, backbone, **options)
        self.head.prepare(model, self)
        backbone_ids = {id(value) for value in backbone.state_dict(keep_vars=True).values()}
        state = model.state_dict(keep_vars=True)
        elsewhere = (*self.head.from_tower, COUNTERS)
        self.given = {entry for entry, value in state.items() if id(value) in backbone_ids or entry.endswith(elsewhere)}
        weights = {entry: state[entry].detach() for entry in self.given}
        filled = our_weights({entry: self.weight(entry) for entry in self.shapes}, self.released_names())
        load_weights(
            model, weights | {entry: value for entry, value in filled.items() if entry in state}, self.meta_path
        )
        return model.eval()

    def released_names(self) -> ReleasedNames:
        """Returns the names of the method's released weights, including those that its checkpoints do not provide."""
        names = models.method_class(self.head.method or self.head.name).released
        unused = [name for name in names.unused if name not in self.head.hidden]
        return replace(names, used={**names.used, **self.head.hidden}, unused=unused)

    def weight(self, name: str, shape: list[int] | None = None) -> Tensor:
        """Returns the weight of a name by the rule of the folder, float32."""
        return released_weight(name, self.shapes[name] if shape is None else shape, self.rule)

    def episode(self, name: str, mode: str) -> tuple[Episode, EpisodeLabels]:
        """Returns an episode of the folder, and its labels among all classes of the mode (train or eval)."""
        classes, support_labels = self.labels(f"{name}.classes"), self.labels(f"{name}.sl")
        if support_labels.bincount().unique().numel() != 1 or support_labels.unique().numel() != len(classes):
            raise UserError(f"{self.folder}: episode {name} needs equally many support videos of each of its classes")
        texts = self.texts(mode)
        in_order = self.tensor(f"{name}.support")[support_labels.argsort(stable=True)]
        support = rearrange(in_order, "(n k) ... -> 1 n k ...", n=len(classes))
        episode = Episode(support, self.tensor(f"{name}.query")[None], texts[classes][None])
        return episode, EpisodeLabels(self.labels(f"{name}.ql")[None], classes[None], texts)

    def batch(self, name: str, mode: str, batched: bool) -> tuple[Episode, EpisodeLabels, Tensor]:
        """Returns an episode with its labels and released scores [B, Q, N]; batched: with a permuted copy."""
        episode, labels = self.episode(name, mode)
        scores = self.scores(name, mode)
        if not batched:
            return episode, labels, scores
        generator = torch.Generator().manual_seed(0)
        ways = torch.randperm(episode.support.shape[1], generator=generator)
        queries = torch.randperm(episode.query.shape[1], generator=generator)
        both = Episode(
            torch.cat([episode.support, episode.support[:, ways]]),
            torch.cat([episode.query, episode.query[:, queries]]),
            torch.cat([episode.class_text, episode.class_text[:, ways]]),
        )
        both_labels = EpisodeLabels(
            torch.cat([labels.query, ways.argsort()[labels.query[:, queries]]]),
            torch.cat([labels.class_ids, labels.class_ids[:, ways]]),
            labels.all_text,
        )
        return both, both_labels, torch.cat([scores, scores[:, queries][:, :, ways]])


def normalised_frames(frames: Tensor) -> Tensor:
    """Normalises frames for CLIP's towers: uint8 [..., 3, H, W] -> float32."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (frames / 255 - mean) / std


def find_meta(folder: Path, method: str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Returns the file that describes a method's weights, its section, and the hyper-parameters.

    Raises:
        KeyError: no file has such a section. Other exceptions: a file is unreadable.
    """
    for path in (place / file for place in (folder, folder.absolute().parent) for file in META_FILES):
        if not path.is_file():
            continue
        meta = json.loads(path.read_text())
        if method in meta.get("methods", {}):
            return path, meta["methods"][method], meta["methods"][method].get("params", {})
        if method in meta.get("shapes", {}):
            return path, {"shapes": meta["shapes"][method]}, meta.get("params", {})
    raise KeyError(method)


def released_weight(name: str, shape: list[int], rule: Mapping[str, Any]) -> Tensor:
    """Returns scaled normal numbers, with the name's checksum as the seed, plus 1 for scales: float32."""
    normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    gain = rule.get("gain", {})
    values = (normal * rule.get("fill_scale", 0.02)).astype(np.float32)
    values = values * np.float32(gain.get(name, gain.get("*", 1)))
    is_scale = name.endswith(".weight") and len(shape) == 1 if "fill_scale" in rule else name.endswith("norm.weight")
    start = is_scale or name in ("scale", "mo_alpha1", *rule.get("plus_one", ()))
    return torch.as_tensor(values + np.float32(start))


def build_head(method: str, backbone: nn.Module, **options: object) -> FewShotModel:
    """Returns a method whose backbone is the given network."""
    method_class = models.method_class(method)
    with ExitStack() as stack:
        for module, name in BACKBONES:
            stack.enter_context(mock.patch.object(module, name, return_value=backbone))
        return method_class(method_class.Options(NAME=method, **options), 224)  # type: ignore[call-arg]


def encoded(model: FewShotModel, episode: Episode) -> Episode:
    """Returns the episode with its videos encoded by the model."""
    return Episode(
        rearrange(model.encode(episode.support.flatten(0, 2)), "(b n k) ... -> b n k ...", **sizes(episode)),
        rearrange(model.encode(episode.query.flatten(0, 1)), "(b q) ... -> b q ...", b=len(episode.query)),
        episode.class_text,
    )


def sizes(episode: Episode) -> dict[str, int]:
    """Returns the numbers of episodes and ways, by the letters of the shapes."""
    return {"b": episode.support.shape[0], "n": episode.support.shape[1]}


def options_of(parameters: Mapping[str, Any], head: Head) -> Options:
    """Returns our options for the released hyper-parameters that have a counterpart."""
    options: Options = {}
    for name, path in head.parameters.items():
        if name in parameters:
            section = options.setdefault(path[0], {}) if len(path) > 1 else options
            section[path[-1]] = parameters[name]
    return options


def merge(first: Options, second: Options) -> Options:
    """Merges options section by section; the second ones take precedence."""
    merged = first | second
    for name, value in second.items():
        if isinstance(value, dict):
            merged[name] = first.get(name, {}) | value
    return merged
