"""Proves a method equal to the released head on given numbers, and prints one JSON line.

    python benchmarks/parity.py --fixtures DIR --method clipspm

DIR holds meta.json (`shapes[method]`: names and shapes of the released weights, each filled by a function of its name;
`params`: the head's hyper-parameters, our defaults where it names none) and <method>.npz (for each episode <ep>:
<ep>.support [N*K, T, D], <ep>.query [Q, T, D], <ep>.classes [N], <ep>.sl [N*K], <ep>.ql [Q], and what the released head
returned, <ep>.eval.* and <ep>.train.*; text_train and text_test [C, D]). Every episode is scored, and gives its losses,
alone and in one call with a copy of itself whose classes and queries are permuted. The line gives the largest
difference of a score, relative to the largest score of its episode, and the largest relative difference of each loss
term; a number that is none on one side counts as an infinite difference.
"""

import argparse
import json
import math
import sys
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import models.clip_fsar
from models.base import Episode, EpisodeLabels, FewShotModel
from models.released import our_name
from run.command import run_command
from utils.checkpoint import load_weights
from utils.errors import UserError

# The released name of the scores.
SCORES = {"clipspm": "logits", "clipfsar": "logits", "cpm2c": "logits_local"}
# The hyper-parameters of meta.json that a score or a loss term depends on, and where our options have them. The others
# are weights of the losses, whose terms are compared one by one, or belong to modules that nothing uses.
PARAMETERS = {
    "clipspm": {
        "alpha": ("SPM", "ALPHA"),
        "mid_dim_text": ("SPM", "TEXT_HIDDEN"),
        "mid_dim_vision": ("SPM", "VISION_HIDDEN"),
        "negative_slope": ("SPM", "NEGATIVE_SLOPE"),
    },
    "clipfsar": {},
    "cpm2c": {
        "alpha": ("GATES", "ALPHA"),
        "mid_dim_text": ("GATES", "TEXT_HIDDEN"),
        "mid_dim_vision": ("GATES", "VISION_HIDDEN"),
        "negative_slope": ("GATES", "NEGATIVE_SLOPE"),
        "motion_residual_ratio": ("MOTION_RESIDUAL",),
    },
}
Options = dict[str, Any]


class NoTowers(nn.Module):
    """Stands in for CLIP: the fixtures begin with its features."""

    pixel_mean = pixel_std = (0.0, 0.0, 0.0)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


def released_weight(name: str, shape: list[int]) -> Tensor:
    """The fill rule of meta.json: float32 of the given shape."""
    values = (np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape) * 0.02).astype(np.float32)
    start = 1 if name.endswith("norm.weight") or name in ("scale", "mo_alpha1") else 0
    return torch.as_tensor(values + np.float32(start))


class Fixtures:
    """The folder's numbers for one method."""

    def __init__(self, folder: Path, method: str) -> None:
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.shapes = meta["shapes"][method]
            with np.load(folder / f"{method}.npz") as archive:
                self.arrays = {key: archive[key] for key in archive.files}
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{folder}: expected meta.json and {method}.npz of released numbers ({error})") from error
        self.folder = folder
        self.method = method
        self.options = options_of(meta.get("params", {}), method)
        self.episodes = sorted(key.removesuffix(".support") for key in self.arrays if key.endswith(".support"))
        if not self.episodes:
            raise UserError(f"{folder}: {method}.npz holds no episode (no entry <ep>.support); name another folder")
        self.width = self.tensor("text_train").shape[1]
        self._built: dict[str, FewShotModel] = {}

    def tensor(self, key: str) -> Tensor:
        """One array as a float32 tensor."""
        if key not in self.arrays:
            raise UserError(f"{self.folder}: {self.method}.npz has no entry {key}; name a folder with whole episodes")
        return torch.as_tensor(self.arrays[key]).float()

    def labels(self, key: str) -> Tensor:
        """One array of class numbers, int64."""
        return self.tensor(key).long()

    def value(self, key: str) -> float:
        """One number."""
        return self.tensor(key).item()

    def build(self, **options: object) -> FewShotModel:
        """The head with the released weights, in evaluation mode, its hyper-parameters those of the folder."""
        merged = merge(self.options, options)
        key = json.dumps(merged, sort_keys=True)
        if key not in self._built:
            self._built[key] = self._build(merged)
        return self._built[key]

    def _build(self, options: Options) -> FewShotModel:
        method = models.method_class(self.method)
        with mock.patch.object(models.clip_fsar, "ClipTowers", return_value=NoTowers(self.width)):
            model = method(method.Options(NAME=self.method, **options), 224)  # type: ignore[call-arg]
        weights = {
            ours: released_weight(name, shape)
            for name, shape in self.shapes.items()
            if (ours := our_name(name, method.released)) in model.state_dict()
        }
        load_weights(model, weights, self.folder / "meta.json")
        return model.eval()

    def episode(self, name: str, mode: str) -> tuple[Episode, EpisodeLabels]:
        """An episode, and its labels among all classes of the mode's texts (train or eval)."""
        classes, support_labels = self.labels(f"{name}.classes"), self.labels(f"{name}.sl")
        if support_labels.bincount().unique().numel() != 1 or support_labels.unique().numel() != len(classes):
            raise UserError(f"{self.folder}: episode {name} needs equally many support videos of each of its classes")
        texts = self.tensor("text_train" if mode == "train" else "text_test")
        in_order = self.tensor(f"{name}.support")[support_labels.argsort(stable=True)]
        support = rearrange(in_order, "(n k) t d -> 1 n k t d", n=len(classes))
        episode = Episode(support, self.tensor(f"{name}.query")[None], texts[classes][None])
        return episode, EpisodeLabels(self.labels(f"{name}.ql")[None], classes[None], texts)

    def batch(self, name: str, mode: str, batched: bool) -> tuple[Episode, EpisodeLabels, Tensor]:
        """An episode with its labels and released scores [B, Q, N]; batched: with a copy whose orders are others."""
        episode, labels = self.episode(name, mode)
        scores = self.tensor(f"{name}.{mode}.{SCORES[self.method]}")
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


def options_of(parameters: dict[str, float], method: str) -> Options:
    """Our options for the released hyper-parameters, as far as these are named."""
    options: Options = {}
    for name, path in PARAMETERS[method].items():
        if name in parameters:
            section = options.setdefault(path[0], {}) if len(path) > 1 else options
            section[path[-1]] = float(parameters[name])
    return options


def merge(first: Options, second: Options) -> Options:
    """Both options, section by section; the second ones hold."""
    merged = first | second
    for name, value in second.items():
        if isinstance(value, dict):
            merged[name] = first.get(name, {}) | value
    return merged


def largest(differences: Iterable[float]) -> float:
    """The largest of them; infinite if one is not a number, which `max` alone would pass over."""
    return max(math.inf if math.isnan(difference) else difference for difference in differences)


def relative_difference(found: Tensor, released: Tensor) -> float:
    """Largest |ours - released| / largest |released|."""
    return ((found - released).abs().max() / released.abs().max().clamp(min=1e-12)).item()


def score_difference(fixtures: Fixtures, model: FewShotModel) -> float:
    """The largest relative difference over all episodes and modes, single and batched."""
    return largest(
        relative_difference(model.score(*episode, "transductive"), released)
        for name in fixtures.episodes
        for mode in ("eval", "train")
        for episode, _, released in (fixtures.batch(name, mode, batched) for batched in (False, True))
    )


def loss_differences(fixtures: Fixtures) -> dict[str, float]:
    """Largest relative difference of each loss term over all episodes, in training with dropout off."""
    terms = {"clipspm": clipspm_terms, "clipfsar": clipfsar_terms, "cpm2c": cpm2c_terms}[fixtures.method]
    differences: dict[str, list[float]] = {}
    for name in fixtures.episodes:
        for batched in (False, True):
            for term, (found, released) in terms(fixtures, name, batched).items():
                relative = abs(found - released) / max(abs(released), 1e-12)
                differences.setdefault(term, []).append(relative)
    return {term: largest(found) for term, found in differences.items()}


def cross_entropy(scores: Tensor, labels: Tensor) -> float:
    """Mean over the queries."""
    return nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten()).item()


def losses(fixtures: Fixtures, name: str, batched: bool, **options: object) -> dict[str, float]:
    """Our training losses on an episode, or on the batch with its copy, which leaves every mean as it is."""
    episode, labels, _ = fixtures.batch(name, "train", batched)
    output = fixtures.build(**options).training_losses(episode, labels, "transductive")
    return {key: value.item() for key, value in output.losses.items()}


def clipspm_terms(fixtures: Fixtures, name: str, batched: bool) -> dict[str, tuple[float, float]]:
    """Term -> (ours, released); the shares 0 and 1 take the queries' and the supports' parts apart."""
    everything = {"AUXILIARY_WEIGHT": 1.0, "HSMR": {"LEARNABLE_WEIGHT": True}}
    of_query = losses(
        fixtures, name, batched, **everything, SPM={"TEXT_QUERY_WEIGHT": 0.5, "CONSISTENCY_QUERY_WEIGHT": 1.0}
    )
    of_support = losses(
        fixtures, name, batched, **everything, SPM={"TEXT_QUERY_WEIGHT": 0.0, "CONSISTENCY_QUERY_WEIGHT": 0.0}
    )

    def released(term: str) -> float:
        return fixtures.value(f"{name}.train.{term}")

    _, labels = fixtures.episode(name, "train")
    scores = fixtures.tensor(f"{name}.train.logits")
    unweighted = losses(fixtures, name, batched, AUXILIARY_WEIGHT=1.0)["motion"]
    return {
        "hsmr": (unweighted, released("hsmr")),
        "cross_entropy": (of_query["cross_entropy"], cross_entropy(scores, labels.query)),
        "weighted_hsmr": (of_query["motion"], released("dists")),
        "text_q": (2 * of_query["text"], released("text_q")),
        "text_s": (2 * of_support["text"], released("text_s")),
        "cons_q": (of_query["consistency"], released("cons_q")),
        "cons_s": (of_support["consistency"], released("cons_s")),
    }


def clipfsar_terms(fixtures: Fixtures, name: str, batched: bool) -> dict[str, tuple[float, float]]:
    """Term -> (ours, the released logits' cross-entropy)."""
    found = losses(fixtures, name, batched, VIDEO_TEXT_WEIGHT=1.0)
    _, labels = fixtures.episode(name, "train")
    return {
        "cross_entropy": (found["cross_entropy"], cross_entropy(fixtures.tensor(f"{name}.train.logits"), labels.query)),
        "video_text": (found["video_text"], released_video_text(fixtures, name, labels)),
    }


def cpm2c_terms(fixtures: Fixtures, name: str, batched: bool) -> dict[str, tuple[float, float]]:
    """Term -> (ours, released): two from logits, the consistency as it stands."""
    weights = {"VIDEO_TEXT": 1.0, "GLOBAL": 1.0, "CONSISTENCY": 1.0}
    found = losses(fixtures, name, batched, LOSSES=weights)
    _, labels = fixtures.episode(name, "train")

    def of_logits(term: str) -> float:
        return cross_entropy(fixtures.tensor(f"{name}.train.{term}"), labels.query)

    return {
        "cross_entropy": (found["cross_entropy"], of_logits("logits_local")),
        "global": (found["global"], of_logits("logits_global")),
        "video_text": (found["video_text"], released_video_text(fixtures, name, labels)),
        "consistency": (found["consistency"], fixtures.value(f"{name}.train.target_consist_distance")),
    }


def released_video_text(fixtures: Fixtures, name: str, labels: EpisodeLabels) -> float:
    """Cross-entropy of the released class logits, which stand for the support videos and then the queries."""
    support_labels = fixtures.labels(f"{name}.sl")
    classes = labels.class_ids[0][torch.cat([support_labels, labels.query[0]])]
    return cross_entropy(fixtures.tensor(f"{name}.train.class_logits")[0], classes)


@torch.no_grad()
def main() -> None:
    """Parses the command line and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", type=Path, required=True, help="folder with meta.json and <method>.npz")
    parser.add_argument("--method", choices=sorted(SCORES), required=True)
    options = parser.parse_args()
    fixtures = Fixtures(options.fixtures, options.method)
    result = {
        "method": options.method,
        "episodes": fixtures.episodes,
        "score_relative_difference": score_difference(fixtures, fixtures.build()),
        "loss_relative_differences": loss_differences(fixtures),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
