"""Each method gives the numbers that the released heads gave on the same weights and features.

`benchmarks/parity.py` reads the numbers and takes every loss apart into its terms; here whole losses are compared, one
episode alone and among others, and the classes that a score picks.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import models
from benchmarks import parity
from benchmarks.parity import relative_difference
from benchmarks.released_fixtures import FakeTowers, Fixtures, build_head, encoded, merge
from benchmarks.released_heads import HEADS, released_video_text
from models import model_clipfsar
from models.base import FewShotModel
from models.clip_method import video_text_logits
from models.released import our_weights
from tests.helpers.commands import in_process
from tests.helpers.released import released_state
from tests.helpers.shipped import ROOT
from utils.errors import UserError

FOLDER = ROOT / "tests" / "fixtures" / "released"
METHODS = ["clipfsar", "clipspm", "cpm2c"]  # compared loss by loss
FOLDERS = {head: FOLDER if head in METHODS else FOLDER.with_name("zoo") for head in HEADS}
EPISODES = ["s1q1", "s5q4"]  # 5-way 1-shot with a query of each class, 5-way 5-shot with four
# The released settings as options of this project, with weights that make each loss matter.
OPTIONS: dict[str, dict[str, Any]] = {
    "clipspm": {"AUXILIARY_WEIGHT": 1.0, "HSMR": {"LEARNABLE_WEIGHT": True}},
    "clipfsar": {"VIDEO_TEXT_WEIGHT": 1.0},
    "cpm2c": {"LOSSES": {"LOCAL": 1.0, "VIDEO_TEXT": 0.5, "GLOBAL": 2.0, "CONSISTENCY": 0.001}},
}

all_heads = pytest.mark.parametrize("method", sorted(HEADS))
all_methods = pytest.mark.parametrize("method", METHODS)
all_episodes = pytest.mark.parametrize("name", EPISODES)
both_modes = pytest.mark.parametrize("mode", ["eval", "train"])
alone_and_batched = pytest.mark.parametrize("batched", [False, True], ids=["alone", "batched"])


def released_losses(fixtures: Fixtures, name: str) -> dict[str, float]:
    """Returns the losses from the released terms under OPTIONS, with the released weights of 0.5 and 1."""

    def term(key: str) -> float:
        return fixtures.value(f"{name}.train.{key}")

    def cross_entropy(key: str) -> float:
        return F.cross_entropy(fixtures.tensor(f"{name}.train.{key}")[0], labels.query[0]).item()

    _, labels = fixtures.episode(name, "train")
    losses = {"cross_entropy": cross_entropy(fixtures.head.scores)}
    if fixtures.head.name == "clipspm":
        losses["motion"] = term("dists")
        losses["text"] = 0.07 * term("text_q") + 0.43 * term("text_s")
        losses["consistency"] = 0.54 * term("cons_q") + 0.46 * term("cons_s")
        return losses
    video_text = released_video_text(fixtures, name, labels)
    if fixtures.head.name == "clipfsar":
        return losses | {"video_text": video_text}
    losses["global"] = 2 * cross_entropy("logits_global")
    losses["consistency"] = 0.001 * term("target_consist_distance")
    return losses | {"video_text": 0.5 * video_text}


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixtures]:
    return {method: Fixtures(FOLDERS[method], HEADS[method]) for method in HEADS}


@torch.no_grad()
@all_heads
@both_modes
@alone_and_batched
def test_scores_equal_the_released_head(fixtures, method, mode, batched):
    model = fixtures[method].build()
    for name in fixtures[method].episodes:
        episode, _, released = fixtures[method].batch(name, mode, batched)
        features = encoded(model, episode)
        for protocol in ["transductive"] if model.transductive else ["transductive", "inductive"]:
            scores = model.score(*features, protocol)
            assert relative_difference(scores, released) < 1e-4
            assert torch.equal(scores.argmax(-1), released.argmax(-1))


@torch.no_grad()
@all_heads
def test_every_loss_term_equals_the_released_head(fixtures, method):
    known = copy.copy(fixtures[method])
    if method == "molo":  # whose decoder of complete frames takes seconds per episode
        known.episodes = known.episodes[:1]
    differences = parity.loss_differences(known)
    assert differences
    assert all(difference < 1e-3 for difference in differences.values()), differences


@torch.no_grad()
@all_methods
@all_episodes
@alone_and_batched
def test_every_loss_equals_the_released_head(fixtures, method, name, batched):
    episode, labels, released = fixtures[method].batch(name, "train", batched)
    output = fixtures[method].build(**OPTIONS[method]).training_losses(episode, labels, "transductive")
    assert relative_difference(output.scores, released) < 1e-4
    expected = released_losses(fixtures[method], name)
    assert {key: loss.item() for key, loss in output.losses.items()} == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("method", ["clipfsar", "cpm2c"])
@all_episodes
@both_modes
def test_video_text_logits_equal_the_released_head(fixtures, method, name, mode):
    episode, labels = fixtures[method].episode(name, mode)
    videos = torch.cat([episode.support.flatten(1, 2), episode.query], dim=1)
    # The released CLIP-FSAR takes the training classes in both modes.
    texts = fixtures[method].tensor("text_train") if method == "clipfsar" else labels.all_text
    found = video_text_logits(videos, texts, fixtures[method].build().scale)
    assert relative_difference(found, fixtures[method].tensor(f"{name}.{mode}.class_logits")) < 1e-4


@all_heads
def test_released_weights_and_parameters_correspond_one_to_one(fixtures, method):
    released = {name: fixtures[method].weight(name) for name in fixtures[method].shapes}
    expected = {name: value.shape for name, value in our_weights(released, fixtures[method].released_names()).items()}
    fresh = Fixtures(FOLDERS[method], HEADS[method])
    state = fresh.build(**OPTIONS.get(method, {})).state_dict()
    assert {name: value.shape for name, value in state.items() if name not in fresh.given} == expected


def test_the_parity_command_prints_one_line_of_json():
    finished = in_process("benchmarks/parity.py", "--fixtures", FOLDER, "--method", "clipfsar")
    (line,) = finished.stdout.splitlines()
    result = json.loads(line)
    assert (result["method"], result["episodes"]) == ("clipfsar", EPISODES)
    assert result["score_relative_difference"] < 1e-4
    assert set(result["loss_relative_differences"]) == {"cross_entropy", "video_text"}


# --- other folders of the same format ---------------------------------------------------------------------

WIDTH = 16
PARAMETERS = {
    "clipspm": {"alpha": 0.353, "mid_dim_text": 0.75, "mid_dim_vision": 2, "negative_slope": 0.052},
    "clipfsar": {"alpha": 0.353},  # not a parameter of this method
    "cpm2c": {
        "alpha": 0.86,
        "mid_dim_text": 2,
        "mid_dim_vision": 0.5,
        "negative_slope": 0.3,
        "motion_residual_ratio": 0.4,
    },
}
OURS: dict[str, dict[str, Any]] = {
    "clipspm": {"SPM": {"ALPHA": 0.353, "TEXT_HIDDEN": 0.75, "VISION_HIDDEN": 2.0, "NEGATIVE_SLOPE": 0.052}},
    "clipfsar": {},
    "cpm2c": {
        "GATES": {"ALPHA": 0.86, "TEXT_HIDDEN": 2.0, "VISION_HIDDEN": 0.5, "NEGATIVE_SLOPE": 0.3},
        "MOTION_RESIDUAL": 0.4,
    },
}
SIZES = {"a.b": (2, 3, 5, 4), "w7": (7, 1, 7, 8)}  # ways, shots, queries, frames


def small_head(method: str, **options: Any) -> FewShotModel:
    """Returns this project's head for features of WIDTH, in evaluation mode."""
    return build_head(method, FakeTowers(WIDTH), **options).eval()


def small_shapes(method: str) -> dict[str, list[int]]:
    """Returns the released names and shapes for features of WIDTH."""
    state = small_head(method, **merge(OURS[method], OPTIONS[method])).state_dict()
    names = models.method_class(method).released
    return {name: list(value.shape) for name, value in released_state(state, names).items()}


@torch.no_grad()
def other_folder(folder: Path, method: str, interleaved: bool = False) -> dict[str, Any]:
    """Writes a folder with the scores of this project's head with PARAMETERS; returns its arrays."""
    folder.mkdir(exist_ok=True)
    meta = {"params": PARAMETERS[method], "shapes": {method: small_shapes(method)}}
    (folder / "meta.json").write_text(json.dumps(meta))
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {f"text_{mode}": random.normal(size=(9, WIDTH)) for mode in ("train", "test")}
    for name, (ways, shots, queries, frames) in SIZES.items():
        arrays[f"{name}.support"] = random.normal(size=(ways * shots, frames, WIDTH))
        arrays[f"{name}.query"] = random.normal(size=(queries, frames, WIDTH))
        arrays[f"{name}.classes"] = random.permutation(9)[:ways]
        arrays[f"{name}.sl"] = np.arange(ways * shots) % ways if interleaved else np.repeat(np.arange(ways), shots)
        arrays[f"{name}.ql"] = (np.arange(queries) % ways).astype(np.float32)  # as the released loader returns them
    np.savez(folder / f"{method}.npz", **arrays)
    fixtures = Fixtures(folder, HEADS[method])
    model = small_head(method, **OURS[method])
    model.load_state_dict(fixtures.build().state_dict())
    for name in SIZES:
        for mode in ("eval", "train"):
            episode, _ = fixtures.episode(name, mode)
            arrays[f"{name}.{mode}.{HEADS[method].scores}"] = model.score(*episode, "transductive").numpy()
    np.savez(folder / f"{method}.npz", **arrays)
    return arrays


def compare(folder: Path, method: str) -> float:
    fixtures = Fixtures(folder, HEADS[method])
    return parity.score_difference(fixtures, fixtures.build())


@torch.no_grad()
@all_methods
@pytest.mark.parametrize("interleaved", [False, True], ids=["class by class", "interleaved"])
def test_other_sizes_parameters_and_orders_are_read_from_the_folder(method, interleaved, tmp_path):
    other_folder(tmp_path, method, interleaved)
    assert Fixtures(tmp_path, HEADS[method]).episodes == sorted(SIZES)
    assert compare(tmp_path, method) < 1e-5


@torch.no_grad()
def test_nan_values_never_pass(fixtures):
    changed = copy.copy(fixtures["clipfsar"])  # its weights are those already filled
    changed.arrays = {
        key: array * np.float32("nan") if key.startswith("s1q1.train.") else array
        for key, array in changed.arrays.items()
    }
    assert parity.score_difference(changed, changed.build()) == float("inf")
    assert set(parity.loss_differences(changed).values()) == {float("inf")}


def test_a_wrong_weight_changes_batched_losses(fixtures, monkeypatch):
    """The batched form is compared as well: a loss that sums over episodes is detected."""
    single = model_clipfsar.video_text_loss
    monkeypatch.setattr(
        model_clipfsar, "video_text_loss", lambda episode, *others: single(episode, *others) * len(episode.query)
    )
    with torch.no_grad():
        assert parity.loss_differences(fixtures["clipfsar"])["video_text"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: {key: arrays[key] for key in arrays if not key.endswith(".support")}, "contains no episode"),
        (lambda arrays: {key: arrays[key] for key in arrays if key != "w7.query"}, r"has no entry w7\.query"),
        (lambda arrays: arrays | {"w7.sl": arrays["w7.sl"] * 0}, "equally many support videos"),
    ],
)
def test_an_incomplete_folder_is_refused_in_one_sentence(change, message, tmp_path):
    arrays = other_folder(tmp_path, "clipfsar")
    np.savez(tmp_path / "clipfsar.npz", **change(arrays))
    with pytest.raises(UserError, match=message), torch.no_grad():
        compare(tmp_path, "clipfsar")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"text"])
def test_a_file_that_is_not_an_archive_is_refused_in_one_sentence(content, tmp_path):
    shutil.copy(FOLDER / "meta.json", tmp_path)
    (tmp_path / "clipfsar.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.json.*clipfsar\.npz"):
        Fixtures(tmp_path, HEADS["clipfsar"])
