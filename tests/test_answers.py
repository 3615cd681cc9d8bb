"""results.json and answers.npz: every answer of a test run, and what it depends on."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from run.answers import Answers
from run.main_run import Learner
from run.results_file import COMPARED, REPORTED, read_results
from tests.helpers.tiny_dataset import TinyDataset, tiny_class_names
from tests.helpers.tiny_runs import tiny_config, trained
from tests.helpers.toy_runs import toy_run
from utils import utils
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.statistics import over_videos
from utils.utils import git_state

FIRST_COMMIT = "a" * 40


@pytest.fixture(scope="module")
def run(tiny_dataset: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Returns one trained and tested run: its directory and results. The clone changes before the test run."""
    directory, commits = tmp_path_factory.mktemp("runs") / "whole", [FIRST_COMMIT]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "subprocess", SimpleNamespace(run=lambda *_, **__: SimpleNamespace(stdout=commits[-1])))
        git_state.cache_clear()
        learner = trained(tiny_dataset, directory)
        commits.append("b" * 40)
        results = learner.test()
    git_state.cache_clear()
    return directory, results


def test_stored_answers_reproduce_the_results(run):
    directory, results = run
    answers = Answers.load(directory / results["answers"])
    assert set(answers.scores) == {"transductive", "inductive"}
    assert answers.classes.tolist() == tiny_class_names("test")
    assert answers.prompts.tolist() == [name.replace("_", " ") for name in tiny_class_names("test")]
    for protocol, found in results["accuracy_by_protocol"].items():
        assert 100 * answers.is_right(protocol).mean() == pytest.approx(found["accuracy"])
    protocol = results["protocol"]
    assert answers.is_right(protocol).mean(axis=1).tolist() == pytest.approx(results["per_episode"], abs=1e-6)
    chosen, true = answers.chosen_classes(protocol), answers.true_classes()
    for row in results["per_class"]:
        [number] = np.flatnonzero(answers.classes == row["class"])
        assert (true == number).sum() == row["queries"]
        if row["queries"]:
            assert 100 * (chosen == true)[true == number].mean() == pytest.approx(row["accuracy"])
    folders = [video.split("/")[0] for video in answers.videos]
    assert all(folders[video] == answers.classes[c] for video, c in zip(answers.query.flat, true.flat, strict=True))
    assert not set(answers.query[0]) & set(answers.support[0].flat)


def test_a_clone_has_changed_if_a_tracked_file_has(tmp_path, monkeypatch):
    code = tmp_path / "utils/utils.py"
    code.parent.mkdir()
    code.touch()
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "first")):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(utils, "__file__", str(code))
    found = []
    for change in (lambda: None, (tmp_path / "results.json").touch, lambda: code.write_text("1")):
        change()
        git_state.cache_clear()
        found.append(git_state()["changed"])
    git_state.cache_clear()
    assert found == [False, False, True]


def test_results_contain_intervals_over_videos_for_each_protocol(run):
    directory, results = run
    answers = Answers.load(directory / results["answers"])
    for protocol, found in results["accuracy_by_protocol"].items():
        arguments = answers.support, answers.query, answers.class_of_video()
        expected = over_videos(answers.is_right(protocol).astype(float), *arguments).interval
        assert found["interval_95_videos"] == pytest.approx(100 * expected)
    assert results["interval_95_videos"] == results["accuracy_by_protocol"][results["protocol"]]["interval_95_videos"]


def test_results_name_the_code_the_device_and_the_best_validation(run):
    directory, results = run
    assert results["device"].startswith("cpu")
    assert results["test_seconds"] > 0
    assert results["best_validation_accuracy"] == load_checkpoint(directory / "checkpoint_best.pt")["best_accuracy"]
    assert results["git"]["commit"] == FIRST_COMMIT


def test_tensorboard_has_test_accuracy_and_hyperparameters_in_one_run(run):
    directory, results = run
    assert not [path for path in (directory / "tensorboard").iterdir() if path.is_dir()]
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    [scalar] = events.Scalars("test/accuracy")
    assert (scalar.value, scalar.step) == (pytest.approx(results["accuracy"]), results["checkpoint_episodes"])
    assert events.Scalars("test/accuracy_transductive")
    assert events.Scalars("train/loss")
    content = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    options = content.session_start_info.hparams
    assert options["MODEL.NAME"].string_value == "clipspm"
    assert options["TRAIN.WAY"].number_value == 3
    assert options["MODEL.SPM.ENABLED"].string_value == "true"
    assert options["SOLVER.BETAS"].string_value == "[0.9, 0.999]"


@pytest.mark.parametrize("content", [None, b"", b"PK\x05\x06" + bytes(18), b"not a zip file", b"PK\x03\x04 cut off"])
def test_missing_or_damaged_answers_are_named(tmp_path, content):
    path = tmp_path / "answers.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"answers\.npz"):
        Answers.load(path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", lambda a: np.roll(a, 1, axis=1)), ("query", lambda a: a - 100), ("query", lambda a: a + 100),
        ("support", lambda a: a[:, ::-1]), ("labels", lambda a: a[:, :1]), ("labels", lambda a: 1 - a),
        ("class_ids", lambda a: a.astype(float)), ("videos", lambda a: a[:2]), ("classes", lambda a: a[:1].repeat(2)),
        ("prompts", lambda a: a[..., None]), ("prompts", lambda a: np.zeros(len(a))),
        ("scores_inductive", lambda a: a[..., 0]), ("scores_inductive", lambda a: a * np.nan),
        ("scores_inductive", lambda a: a[:3]), ("scores_inductive", lambda a: a.astype(str)),
    ],
)  # fmt: skip
def test_answers_that_do_not_fit_together_are_refused(tmp_path, name, change):
    run = Path(toy_run(tmp_path / "run", [[1, 0]] * 4))
    arrays = dict(np.load(run / "answers.npz"))
    np.savez_compressed(run / "answers.npz", **{**arrays, name: change(arrays[name])})
    with pytest.raises(UserError, match=r"answers\.npz"):
        read_results(run / "results.json", COMPARED)


@pytest.mark.parametrize("value", [None, True, "x", -1.5, [3], {"a": 1}], ids=str)
def test_results_with_entries_of_another_type_are_refused(tmp_path, value):
    run = Path(toy_run(tmp_path / "run", [[1, 0]] * 4))
    content, right = json.loads((run / "results.json").read_text()), {**COMPARED, "differs_from_default": list}
    for name, kind in right.items():
        (run / "results.json").write_text(json.dumps({**content, name: value}))
        if isinstance(value, str) and kind is str and name != "protocol":
            assert read_results(run / "results.json", COMPARED)[0][name] == value
        else:
            with pytest.raises(UserError, match=r"results\.json"):
                read_results(run / "results.json", COMPARED)


def test_results_of_one_episode_have_no_interval_and_can_be_reported(tiny_dataset, tmp_path):
    learner = Learner(tiny_config(tiny_dataset, tmp_path, "TRAIN.TRAIN_EPISODES=0", "TEST.TEST_EPISODES=1"))
    learner.train()
    expected = learner.test()
    results, answers = read_results(tmp_path / "results.json", REPORTED)
    assert results["accuracy"] == expected["accuracy"] == 100 * answers.is_right("inductive").mean()
    assert [entry["interval_95"] for entry in results["accuracy_by_protocol"].values()] == [None, None]
