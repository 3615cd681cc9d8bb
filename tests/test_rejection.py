"""Rejecting unknown classes: the threshold of validation episodes, its error rates, and its use."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import models
from fsar import Prediction
from run import rejection
from run.calibrate import main as calibrate
from run.command import exit_code_of
from run.predict import main as predict
from run.prediction_output import NONE, answers_of
from run.rejection import BestScores
from tests.helpers.shipped import ROOT
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import trained
from utils.checkpoint import BEST
from utils.errors import UserError


def test_rates_equal_counts():
    rng = np.random.default_rng(0)
    known, unknown = rng.normal(1, 1, 200).round(1), rng.normal(0, 1, 100).round(1)
    rates = BestScores(known, unknown).rates(0.5)
    assert rates["false_reject_percent"] == pytest.approx(100 * sum(known < 0.5) / 200)
    assert rates["false_accept_percent"] == pytest.approx(100 * sum(unknown >= 0.5) / 100)
    pairs = [(one > other) + (one == other) / 2 for one in known for other in unknown]
    assert rates["area_under_roc"] == pytest.approx(np.mean(pairs))


def test_a_score_at_the_threshold_is_accepted():
    prediction = Prediction(("run", "jump"), torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 0.75]]))
    answers = {threshold: answers_of(["clip"], prediction, threshold)[0].answer for threshold in (None, 2.0, 2.5)}
    assert answers == {None: "jump", 2.0: "jump", 2.5: NONE}


@pytest.fixture(scope="module")
def learner(tiny_dataset: TinyDataset, tmp_path_factory: pytest.TempPathFactory):
    return trained(tiny_dataset, tmp_path_factory.mktemp("reject") / "run")


def test_a_threshold_is_calibrated_and_used(learner, tiny_dataset, tmp_path, monkeypatch, capsys):
    assert f"{rejection.EPISODES:,} episodes" in (ROOT / "docs/predict.md").read_text(encoding="utf-8")
    monkeypatch.setattr(rejection, "EPISODES", 40)
    checkpoint, file = str(learner.directory.path / BEST), tmp_path / "reject.json"
    words = ["--checkpoint", checkpoint, "--way", "3", "--shot", "1", "--test", "DATA.NUM_WORKERS=0"]
    calibrate([*words, "--false-reject", "20", "--out", str(file)])
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["val"]["false_reject_percent"] == pytest.approx(20, abs=2)
    assert found.keys() >= {"threshold", "way", "shot", "val", "test"}
    assert f"{found['test']['false_accept_percent']:.1f}" in capsys.readouterr().out
    assert exit_code_of(lambda: calibrate([*words, "--out", str(file)])) == 2

    support = tmp_path / "support"
    for number in range(3):
        folder = support / f"class {number}"
        folder.mkdir(parents=True)
        (folder / "clip.mp4").symlink_to(tiny_dataset.videos / f"test_action_{number}/test_action_{number}_00.mp4")
    query = str(tiny_dataset.videos / "test_action_0/test_action_0_01.mp4")
    arguments = ["--checkpoint", checkpoint, "--support", str(support), "--query", query, "--reject", str(file)]
    for threshold, is_rejected in [(-1e9, False), (1e9, True)]:
        file.write_text(json.dumps(found | {"threshold": threshold}))
        capsys.readouterr()
        assert exit_code_of(lambda: predict(arguments)) == 0
        assert ("none of these" in capsys.readouterr().out) is is_rejected
    (support / "class 0/other.mp4").symlink_to(tiny_dataset.videos / "test_action_0/test_action_0_02.mp4")
    for shot in (1, 2):  # the largest class has two
        file.write_text(json.dumps(found | {"shot": shot}))
        capsys.readouterr()
        assert exit_code_of(lambda: predict(arguments)) == 0
        assert ("3-way 1-shot" in capsys.readouterr().err) is (shot == 1)
    for content, fact in [
        (found | {"checkpoint_sha256": "0"}, "another checkpoint"),
        ({}, "threshold"),
        ([], "threshold"),
        (found | {"threshold": float("nan")}, "threshold"),
        (found | {"way": float("inf")}, "threshold"),
    ]:
        file.write_text(json.dumps(content))
        assert exit_code_of(lambda: predict(arguments)) == 2
        assert fact in capsys.readouterr().err


@torch.no_grad()
def test_known_and_unknown_queries_are_those_of_the_episodes_of_the_test_seed(learner, monkeypatch):
    monkeypatch.setattr(rejection, "EPISODES", 10)
    index, model = learner.data.splits["val"], models.load(learner.directory.path / BEST)
    found, seed_of_run = {}, learner.config.MODEL.SEED
    for seed in (None, seed_of_run, 7):
        test = learner.config.TEST.model_copy(update={"SEED": seed})
        config = learner.config.model_copy(update={"TEST": test})
        found[seed] = rejection.best_scores(model, config, index, way=3, shot=1)
        assert (len(found[seed].known), len(found[seed].unknown)) == (30, 20)  # val has five classes
    assert np.array_equal(found[None].known, found[seed_of_run].known)
    assert not np.array_equal(found[None].known, found[7].known)


def test_a_threshold_is_calibrated_in_the_precision_of_predictions(learner, monkeypatch):
    monkeypatch.setattr(rejection, "EPISODES", 5)
    index = rejection.open_splits(learner.config, ["val"], way=3, shot=1)["val"]
    scores = []
    for amp in (False, True):
        config = learner.config.model_copy(update={"USE_AMP": amp})
        model = models.load(learner.directory.path / BEST)
        scores.append(rejection.best_scores(model, config, index, way=3, shot=1).known)
    assert np.array_equal(*scores)


@pytest.mark.parametrize(
    ("words", "fact"), [(["--way", "5"], "lower --way to 4"), (["--shot", "6"], "lower --shot to 5")]
)
def test_episodes_too_large_for_the_split_are_refused(learner, capsys, words, fact):
    arguments = ["--checkpoint", str(learner.directory.path / BEST), "--way", "3", *words]
    assert exit_code_of(lambda: calibrate(arguments)) == 2
    assert fact in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "videos", "fact"), [(2, 5, "val of own has 2 classes.*3"), (3, 1, "a class of val has 1 video.*2")]
)
def test_a_split_too_small_for_any_threshold_gets_no_impossible_advice(classes, videos, fact, monkeypatch):
    split = SimpleNamespace(dataset="own", classes=["class"] * classes, videos_of_class=[[0] * videos] * classes)
    monkeypatch.setattr(rejection, "load_splits_of", lambda config, splits: {"val": split})
    with pytest.raises(UserError, match=fact) as refused:
        rejection.open_splits(None, ["val"], way=2, shot=1)
    assert "lower" not in str(refused.value)


def test_a_threshold_that_cannot_be_written_is_refused_before_it_is_measured(learner, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", lambda *arguments: pytest.fail("the checkpoint was read"))
    (tmp_path / "file").write_text("mine")
    arguments = ["--checkpoint", str(learner.directory.path / BEST), "--out", str(tmp_path / "file" / "reject.json")]
    assert exit_code_of(lambda: calibrate(arguments)) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--way", "1"], ["--shot", "0"], ["--false-reject", "0"], ["--false-reject", "nan"]])
def test_sizes_out_of_range_are_refused(words):
    with pytest.raises(SystemExit) as refused:
        calibrate(["--checkpoint", __file__, *words])
    assert refused.value.code == 2
