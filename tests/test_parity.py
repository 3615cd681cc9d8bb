"""Each method gives the numbers that the released heads gave on the same weights and features.

`benchmarks/parity.py` reads the numbers and takes every loss apart into its terms; here whole losses are compared, one
episode alone and among others, and the classes that a score picks.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from benchmarks.parity import SCORES, Fixtures, released_video_text, with_permuted_copy
from models.base import Episode, EpisodeLabels
from utils.released import our_name

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "fixtures" / "released"
METHODS = sorted(SCORES)
EPISODES = ["s1q1", "s5q4"]  # 5-way 1-shot with a query of each class, 5-way 5-shot with four
# What was released, in the terms of our options, with weights that make each loss count.
OPTIONS: dict[str, dict[str, Any]] = {
    "clipspm": {"AUXILIARY_WEIGHT": 1.0, "HSMR": {"LEARNABLE_WEIGHT": True}},
    "clipfsar": {"VIDEO_TEXT_WEIGHT": 1.0},
    "cpm2c": {"LOSSES": {"LOCAL": 1.0, "VIDEO_TEXT": 0.5, "GLOBAL": 2.0, "CONSISTENCY": 0.001}},
}

all_methods = pytest.mark.parametrize("method", METHODS)
all_episodes = pytest.mark.parametrize("name", EPISODES)
both_modes = pytest.mark.parametrize("mode", ["eval", "train"])
alone_and_batched = pytest.mark.parametrize("batched", [False, True], ids=["alone", "batched"])


def relative_difference(found: Tensor, released: Tensor) -> float:
    return ((found - released).abs().max() / released.abs().max()).item()


def batch_of(fixtures: Fixtures, name: str, mode: str, batched: bool) -> tuple[Episode, EpisodeLabels, Tensor]:
    """An episode, its labels and released scores [B, Q, N]; batched with a copy whose classes and queries moved."""
    episode, labels = fixtures.episode(name, mode)
    scores = fixtures.tensor(f"{name}.{mode}.{SCORES[fixtures.method]}")
    if not batched:
        return episode, labels, scores
    both, ways, queries = with_permuted_copy(episode)
    moved = ways.argsort()[labels.query[:, queries]]
    class_ids = torch.cat([labels.class_ids, labels.class_ids[:, ways]])
    both_labels = EpisodeLabels(torch.cat([labels.query, moved]), class_ids, labels.all_text)
    return both, both_labels, torch.cat([scores, scores[:, queries][:, :, ways]])


def released_losses(fixtures: Fixtures, name: str) -> dict[str, float]:
    """The losses that the released terms make under OPTIONS; the shares of 0.5 and of 1 are the published ones."""

    def term(key: str) -> float:
        return fixtures.value(f"{name}.train.{key}")

    def cross_entropy(key: str) -> float:
        return F.cross_entropy(fixtures.tensor(f"{name}.train.{key}")[0], labels.query[0]).item()

    _, labels = fixtures.episode(name, "train")
    losses = {"cross_entropy": cross_entropy(SCORES[fixtures.method])}
    if fixtures.method == "clipspm":
        losses["motion"] = term("dists")
        losses["text"] = 0.07 * term("text_q") + 0.43 * term("text_s")
        losses["consistency"] = 0.54 * term("cons_q") + 0.46 * term("cons_s")
        return losses
    video_text = released_video_text(fixtures, name, labels)
    if fixtures.method == "clipfsar":
        return losses | {"video_text": video_text}
    losses["global"] = 2 * cross_entropy("logits_global")
    losses["consistency"] = 0.001 * term("target_consist_distance")
    return losses | {"video_text": 0.5 * video_text}


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixtures]:
    return {method: Fixtures(FOLDER, method) for method in METHODS}


@torch.no_grad()
@all_methods
@all_episodes
@both_modes
@alone_and_batched
def test_scores_are_those_of_the_released_head(fixtures, method, name, mode, batched):
    episode, _, released = batch_of(fixtures[method], name, mode, batched)
    model = fixtures[method].build()
    for protocol in ["transductive"] if model.transductive else ["transductive", "inductive"]:
        scores = model.score(episode, protocol)
        assert relative_difference(scores, released) < 1e-4
        assert torch.equal(scores.argmax(-1), released.argmax(-1))


@torch.no_grad()
@all_methods
@all_episodes
@alone_and_batched
def test_every_loss_is_that_of_the_released_head(fixtures, method, name, batched):
    episode, labels, released = batch_of(fixtures[method], name, "train", batched)
    output = fixtures[method].build(**OPTIONS[method]).training_losses(episode, labels, "transductive")
    assert relative_difference(output.scores, released) < 1e-4
    expected = released_losses(fixtures[method], name)
    assert {key: loss.item() for key, loss in output.losses.items()} == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("method", ["clipfsar", "cpm2c"])
@all_episodes
@both_modes
def test_video_text_logits_are_those_of_the_released_head(fixtures, method, name, mode):
    episode, labels = fixtures[method].episode(name, mode)
    videos = torch.cat([episode.support.flatten(1, 2), episode.query], dim=1)
    # The released CLIP-FSAR takes the training classes in both modes.
    texts = fixtures[method].tensor("text_train") if method == "clipfsar" else labels.all_text
    found = fixtures[method].build().video_text_logits(videos, texts)
    assert relative_difference(found, fixtures[method].tensor(f"{name}.{mode}.class_logits")) < 1e-4


@all_methods
def test_every_released_weight_has_a_parameter_of_ours_and_the_other_way_round(fixtures, method):
    names = models.method_class(method).released
    expected = {ours: shape for name, shape in fixtures[method].shapes.items() if (ours := our_name(name, names))}
    state = fixtures[method].build(**OPTIONS[method]).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == expected


@all_methods
def test_the_parity_command_agrees_with_the_committed_numbers(method):
    command = [sys.executable, "benchmarks/parity.py", "--fixtures", str(FOLDER), "--method", method]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = finished.stdout.splitlines()
    result = json.loads(line)
    assert result["score_relative_difference"] < 1e-4
    assert result["loss_relative_differences"]
    assert all(difference < 1e-3 for difference in result["loss_relative_differences"].values())
