"""Proves a method equal to the released head on given numbers, and prints one JSON line.

    python benchmarks/parity.py --fixtures DIR --method clipspm

DIR holds meta.json (`shapes[method]`: names and shapes of the released weights, each filled by a function of its name)
and <method>.npz (for each episode <ep>: <ep>.support [N*K, T, D], <ep>.query [Q, T, D], <ep>.classes [N], <ep>.ql [Q],
and what the released head returned, <ep>.eval.* and <ep>.train.*; text_train and text_test [C, D]). Every episode is
scored alone, and in one call with a copy of itself whose classes and queries are permuted. The line gives the largest
relative difference of a score, and the largest relative difference of each loss term.
"""

import argparse
import json
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import models.clip_method
from models.base import Episode, EpisodeLabels, FewShotModel
from run.command import run_command
from utils.errors import UserError
from utils.released import our_name

# The released name of the scores.
SCORES = {"clipspm": "logits", "clipfsar": "logits", "cpm2c": "logits_local"}


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
            self.shapes = json.loads((folder / "meta.json").read_text())["shapes"][method]
            with np.load(folder / f"{method}.npz") as archive:
                self.arrays = {key: archive[key] for key in archive.files}
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{folder}: expected meta.json and {method}.npz of released numbers ({error})") from error
        self.method = method
        self.episodes = sorted({key.split(".")[0] for key in self.arrays if key.endswith(".support")})
        self.width = self.arrays["text_train"].shape[1]

    def tensor(self, key: str) -> Tensor:
        """One array as a tensor."""
        return torch.as_tensor(self.arrays[key])

    def value(self, key: str) -> float:
        """One number."""
        return float(self.arrays[key])

    def build(self, **options: object) -> FewShotModel:
        """The head with the released weights, in evaluation mode."""
        method = models.method_class(self.method)
        with mock.patch.object(models.clip_method, "ClipTowers", return_value=NoTowers(self.width)):
            model = method(method.Options(NAME=self.method, **options), 224)  # type: ignore[arg-type, call-arg]
        weights = {
            ours: released_weight(name, shape)
            for name, shape in self.shapes.items()
            if (ours := our_name(name, method.released)) in model.state_dict()
        }
        model.load_state_dict(weights)
        return model.eval()

    def episode(self, name: str, mode: str) -> tuple[Episode, EpisodeLabels]:
        """An episode, and its labels among all classes of the mode's texts (train or eval)."""
        classes = self.tensor(f"{name}.classes")
        texts = self.tensor("text_train" if mode == "train" else "text_test")
        support = rearrange(self.tensor(f"{name}.support"), "(n k) t d -> 1 n k t d", n=len(classes))
        episode = Episode(support, self.tensor(f"{name}.query")[None], texts[classes][None])
        return episode, EpisodeLabels(self.tensor(f"{name}.ql")[None], classes[None], texts)


def with_permuted_copy(episode: Episode) -> tuple[Episode, Tensor, Tensor]:
    """The episode and, as a second one of the same call, a copy with other orders; which orders, [N] and [Q]."""
    generator = torch.Generator().manual_seed(0)
    ways = torch.randperm(episode.support.shape[1], generator=generator)
    queries = torch.randperm(episode.query.shape[1], generator=generator)
    copy = Episode(episode.support[:, ways], episode.query[:, queries], episode.class_text[:, ways])
    pairs = zip(vars(episode).values(), vars(copy).values(), strict=True)
    return Episode(*(torch.cat(pair) for pair in pairs)), ways, queries


def score_difference(fixtures: Fixtures, model: FewShotModel) -> float:
    """Largest |ours - released| / largest |released| over all episodes and modes, single and batched."""
    worst = 0.0
    for name in fixtures.episodes:
        for mode in ("eval", "train"):
            released = fixtures.tensor(f"{name}.{mode}.{SCORES[fixtures.method]}")
            episode, _ = fixtures.episode(name, mode)
            both, ways, queries = with_permuted_copy(episode)
            expected = torch.cat([released, released[:, queries][:, :, ways]])
            for found, right in (
                (model.score(episode, "transductive"), released),
                (model.score(both, "transductive"), expected),
            ):
                worst = max(worst, ((found - right).abs().max() / released.abs().max()).item())
    return worst


def loss_differences(fixtures: Fixtures) -> dict[str, float]:
    """Largest relative difference of each loss term over all episodes, in training with dropout off."""
    terms = {"clipspm": clipspm_terms, "clipfsar": clipfsar_terms, "cpm2c": cpm2c_terms}[fixtures.method]
    worst: dict[str, float] = {}
    for name in fixtures.episodes:
        for term, (found, released) in terms(fixtures, name).items():
            worst[term] = max(worst.get(term, 0.0), abs(found - released) / max(abs(released), 1e-12))
    return worst


def cross_entropy(scores: Tensor, labels: Tensor) -> float:
    """Mean over the queries."""
    return nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten()).item()


def losses(fixtures: Fixtures, name: str, **options: object) -> dict[str, float]:
    """Our training losses on an episode."""
    episode, labels = fixtures.episode(name, "train")
    output = fixtures.build(**options).training_losses(episode, labels, "transductive")
    return {key: value.item() for key, value in output.losses.items()}


def clipspm_terms(fixtures: Fixtures, name: str) -> dict[str, tuple[float, float]]:
    """Term -> (ours, released); the shares 0 and 1 take the queries' and the supports' parts apart."""
    everything = {"AUXILIARY_WEIGHT": 1.0, "HSMR": {"LEARNABLE_WEIGHT": True}}
    of_query = losses(fixtures, name, **everything, SPM={"TEXT_QUERY_WEIGHT": 0.5, "CONSISTENCY_QUERY_WEIGHT": 1.0})
    of_support = losses(fixtures, name, **everything, SPM={"TEXT_QUERY_WEIGHT": 0.0, "CONSISTENCY_QUERY_WEIGHT": 0.0})

    def released(term: str) -> float:
        return fixtures.value(f"{name}.train.{term}")

    _, labels = fixtures.episode(name, "train")
    scores = fixtures.tensor(f"{name}.train.logits")
    unweighted = losses(fixtures, name, AUXILIARY_WEIGHT=1.0)["motion"]
    return {
        "hsmr": (unweighted, released("hsmr")),
        "cross_entropy": (of_query["cross_entropy"], cross_entropy(scores, labels.query)),
        "weighted_hsmr": (of_query["motion"], released("dists")),
        "text_q": (2 * of_query["text"], released("text_q")),
        "text_s": (2 * of_support["text"], released("text_s")),
        "cons_q": (of_query["consistency"], released("cons_q")),
        "cons_s": (of_support["consistency"], released("cons_s")),
    }


def clipfsar_terms(fixtures: Fixtures, name: str) -> dict[str, tuple[float, float]]:
    """Term -> (ours, the released logits' cross-entropy)."""
    found = losses(fixtures, name, VIDEO_TEXT_WEIGHT=1.0)
    _, labels = fixtures.episode(name, "train")
    return {
        "cross_entropy": (found["cross_entropy"], cross_entropy(fixtures.tensor(f"{name}.train.logits"), labels.query)),
        "video_text": (found["video_text"], released_video_text(fixtures, name, labels)),
    }


def cpm2c_terms(fixtures: Fixtures, name: str) -> dict[str, tuple[float, float]]:
    """Term -> (ours, released): two from logits, the consistency as it stands."""
    weights = {"VIDEO_TEXT": 1.0, "GLOBAL": 1.0, "CONSISTENCY": 1.0}
    found = losses(fixtures, name, LOSSES=weights)
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
    support_labels = fixtures.tensor(f"{name}.sl")
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
