"""Features that are too large for the free memory are rounded to bf16, and every number from them is recognisable."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import models
from episodes.splits import load_splits
from models.base import FewShotModel
from run import features, rejection
from run.comparison import Run, Side, notes_on
from run.main_run import Learner
from run.reporting.sections import result_section
from run.results import result_line, stored_in_bf16
from run.run_directory import StoredState
from tests.helpers.distributed_jobs import train_until
from tests.helpers.tiny_runs import lines_of, tiny_config, trained
from tests.helpers.toy_runs import toy_run
from utils.checkpoint import LAST, load_checkpoint
from utils.errors import UserError

CPU = torch.device("cpu")
CACHED = ("MODEL.TRAINABLE=head", "TRAIN.CACHED_FEATURES=true", "CHECKPOINT.SAVE_FREQ=2")


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """All features take more than the allowed share of the memory."""
    monkeypatch.setattr(features, "SHARE", 0)
    return monkeypatch


def difference(one: FewShotModel, other: FewShotModel) -> float:
    """Returns how far the weights of two runs are apart, in units of the weights."""
    pairs = [(value, other.state_dict()[name]) for name, value in one.state_dict().items() if value.is_floating_point()]
    squares = sum(float((first - second).square().sum()) for first, second in pairs)
    return (squares / sum(float(first.square().sum()) for first, _ in pairs)) ** 0.5


def test_results_and_metrics_record_rounded_features(tiny_dataset, tmp_path, little_memory, capsys):
    learner = trained(tiny_dataset, tmp_path / "rounded")
    results = learner.test()
    assert results["features_stored_in"] == "bfloat16"
    assert results["trained_on_features_stored_in"] is None  # on clips
    assert "TEST FEATURES IN BF16" in capsys.readouterr().out
    assert [line["val/features_in_bf16"] for line in lines_of(tmp_path / "rounded") if "val/accuracy" in line] == [1, 1]
    assert "test features" in str(result_section(results))
    little_memory.undo()
    exact = learner.test()
    assert exact["features_stored_in"] == "float32"
    assert "BF16" not in result_line(learner.config, exact)


def test_comparisons_mention_rounded_features(tmp_path):
    def side(letter: str, right: int, **results: Any) -> Side:
        return Side(letter, (Run.load(Path(toy_run(tmp_path / letter, [[1, right]] * 4, **results))),))

    older, rounded = side("A", 0), side("B", 1, features_stored_in="bfloat16")
    assert not notes_on([older, side("C", 1, features_stored_in="float32")])
    assert "bfloat16" in "".join(notes_on([older, rounded]))
    assert not stored_in_bf16({})


def test_training_from_rounded_features_is_recorded_and_resumes_bit_exact(tiny_dataset, tmp_path, little_memory):
    whole = trained(tiny_dataset, tmp_path / "whole", *CACHED)
    resumed = SimpleNamespace(cached_in="float32")
    assert whole.training_episodes(range(1), resumed).bank.stored_in == "float32"
    train_until(Learner(tiny_config(tiny_dataset, tmp_path / "cut", *CACHED)), 2)
    little_memory.undo()  # the resumed run has room for float32, and may store features
    stored = f"TEST.FEATURE_CACHE={tmp_path / 'features'}"
    cut = trained(tiny_dataset, tmp_path / "cut", *CACHED, stored, "CHECKPOINT.RESUME_FROM_CHECKPOINT=true")
    assert difference(whole.model, cut.model) == 0
    exact = trained(tiny_dataset, tmp_path / "exact", *CACHED)
    assert "val/features_in_bf16" not in str(lines_of(tmp_path / "exact"))
    assert 0 < difference(exact.model, whole.model) < 1e-3
    results = cut.test()
    assert results["trained_on_features_stored_in"] == "bfloat16"
    assert "TRAINING FEATURES IN BF16" in result_line(cut.config, results)
    content = load_checkpoint(tmp_path / "exact" / LAST)
    assert content.pop("cached_in") == "float32"
    assert StoredState.model_validate(content).cached_in is None  # an older checkpoint


def test_thresholds_of_rejection_use_rounded_features_too(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(rejection, "EPISODES", 20)
    config = tiny_config(tiny_dataset, tmp_path)
    model = models.build(config.MODEL, config.DATA.IMG_SIZE).eval()
    index = load_splits(tiny_dataset.splits, tiny_dataset.videos, ["test"])["test"]

    def scores() -> rejection.BestScores:
        with torch.inference_mode():
            return rejection.best_scores(model, config, index, 3, 1)

    exact = scores()
    monkeypatch.setattr(features, "SHARE", 0)
    rounded = scores()
    assert (exact.stored_in, rounded.stored_in) == ("float32", "bfloat16")
    assert 0 < abs(rounded.known - exact.known).max() < 0.02 * abs(exact.known).max()


def test_features_above_the_free_memory_are_refused(monkeypatch):
    monkeypatch.setattr(features, "free_memory", lambda device: 22)
    assert features.bank_memory((11, 1), CPU).dtype == torch.bfloat16
    with pytest.raises(UserError) as refused:
        features.bank_memory((12, 1), CPU)
    assert "TEST.FEATURE_CACHE" in str(refused.value)
    monkeypatch.setattr(features, "free_memory", lambda device: 22e9)
    with pytest.raises(UserError, match=r"12 videos take 24\.0 GB in bf16"):
        features.bank_memory((12, 10**9), CPU)
