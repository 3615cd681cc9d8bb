"""Training, validation, testing and resuming keep their promises on a tiny data set."""

import json
from contextlib import ExitStack
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange

from episodes.dataset import ClipReader, VideoDataset
from episodes.sampler import EpisodeSampler
from models.base import Episode, ProtocolName
from run import main_run
from run.answers import Answers
from run.encoder import Encoder
from run.evaluation import Evaluation, evaluate
from run.main_run import Learner, groups
from run.recording import Recorder
from run.solver import rate_factor
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import lines_of, tiny_config, trained
from utils.checkpoint import BEST, LAST, load_checkpoint
from utils.config import config_from_dict, load_config
from utils.errors import UserError


@pytest.fixture(scope="module")
def run(tiny_dataset: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Returns one trained and tested run: its directory and its results."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    return directory, trained(tiny_dataset, directory).test()


# Results of a run


def test_a_run_writes_all_its_files(run):
    directory, _ = run
    names = {path.name for path in directory.iterdir()}
    assert names == {
        "answers.npz", "checkpoint_4.pt", "checkpoint_6.pt", "checkpoint_best.pt", "checkpoint_last.pt", "config.yaml",
        "log.txt", "metrics.jsonl", "results.json", "run.lock", "tensorboard",
    }  # fmt: skip
    assert list((directory / "tensorboard").iterdir())


def test_the_saved_config_equals_the_config_of_the_run(run, tiny_dataset):
    directory, _ = run
    assert load_config(directory / "config.yaml").config == tiny_config(tiny_dataset, directory)


def test_metrics_contain_losses_accuracy_rate_and_waiting_time(run):
    directory, _ = run
    training = [line for line in lines_of(directory) if "train/loss" in line]
    assert [line["episode"] for line in training] == [2, 4, 6]
    for name in ("loss", "loss_cross_entropy", "loss_motion", "loss_text", "loss_consistency", "accuracy",
                 "episodes_per_second", "data_wait_percent", "learning_rate"):  # fmt: skip
        assert all(np.isfinite(line[f"train/{name}"]) for line in training)
    for line in training:
        parts = sum(value for key, value in line.items() if key.startswith("train/loss_"))
        assert line["train/loss"] == pytest.approx(parts, rel=1e-5)
        options = load_config(directory / "config.yaml").config.SOLVER
        assert line["train/learning_rate"] == pytest.approx(options.LR * rate_factor(options, line["episode"], 6))
    assert [line["episode"] for line in lines_of(directory) if "val/accuracy" in line] == [4, 6]


def test_results_contain_everything_the_accuracy_depends_on(run):
    directory, results = run
    assert json.loads((directory / "results.json").read_text()) == results
    assert results["episodes"] == len(results["per_episode"]) == 6
    assert results["accuracy"] == pytest.approx(100 * np.mean(results["per_episode"]), abs=1e-3)
    assert set(results["accuracy_by_protocol"]) == {"transductive", "inductive"}
    assert results["accuracy_by_protocol"][results["protocol"]]["accuracy"] == results["accuracy"]
    total = sum(row["queries"] for row in results["per_class"])
    right = sum(row["accuracy"] / 100 * row["queries"] for row in results["per_class"] if row["queries"])
    assert total == 6 * 3
    assert 100 * right / total == pytest.approx(results["accuracy"], abs=1e-3)
    for key in ("episode_list_sha256", "split_sha256", "checkpoint_sha256"):
        assert len(results[key]) == 64
    assert results["checkpoint_selected_on"] == "val"
    assert results["config"]["MODEL"]["NAME"] == "clipspm"
    assert results["versions"]["torch"]


def test_best_has_the_highest_validation_accuracy(run):
    directory, _ = run
    validations = {line["episode"]: line["val/accuracy"] for line in lines_of(directory) if "val/accuracy" in line}
    best = load_checkpoint(directory / "checkpoint_best.pt")
    assert best["best_accuracy"] == max(validations.values())
    assert validations[best["episode"]] == max(validations.values())
    assert load_checkpoint(directory / "checkpoint_last.pt")["episode"] == 6


@pytest.fixture
def recorder() -> Recorder:
    """Returns the recorder of a run of 20 episodes that writes nothing."""
    config = config_from_dict({"TRAIN": {"TRAIN_EPISODES": 20}})
    state, metrics = SimpleNamespace(best_accuracy=-1.0, episode=0), SimpleNamespace(write=lambda *_: None)
    return Recorder(SimpleNamespace(config=config), state, lambda: None, metrics, ExitStack())


def test_work_is_due_in_each_group_that_reaches_a_multiple(recorder):
    for frequency, expected in ((5, [6, 12, 15, 20]), (3, [3, 6, 9, 12, 15, 18, 20]), (0, [20])):
        due = [group.stop for group in groups(range(20), 3) if recorder._is_due(frequency, group)]
        assert due == expected


def test_the_best_validation_is_better_than_all_before(recorder):
    shares = (0.5, 0.5, 0.25, 0.4, 0.75)
    validations = [SimpleNamespace(per_episode=np.full(3, share), stored_in="float32") for share in shares]
    assert [recorder._improved(validation) for validation in validations] == [True, False, False, False, True]
    assert recorder.state.best_accuracy == 75


# Determinism


def test_equal_seeds_give_equal_weights_and_other_seeds_do_not(run, tiny_dataset, tmp_path):
    directory, results = run
    again = trained(tiny_dataset, tmp_path / "again")
    other = trained(tiny_dataset, tmp_path / "other", "MODEL.SEED=2")
    first = load_checkpoint(directory / "checkpoint_last.pt")["model"]
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in first.items())
    assert not all(torch.equal(value, other.model.state_dict()[name]) for name, value in first.items())
    assert again.test()["per_episode"] == results["per_episode"]


def test_results_are_bit_exact_for_any_number_of_workers(run, tiny_dataset, tmp_path):
    first = load_checkpoint(run[0] / "checkpoint_last.pt")["model"]
    workers = trained(tiny_dataset, tmp_path / "workers", "DATA.NUM_WORKERS=2").model.state_dict()
    assert all(torch.equal(value, workers[name]) for name, value in first.items())


def test_a_nonfinite_loss_stops_before_the_step_and_saves_nothing(tiny_dataset, tmp_path):
    overrides = ("SOLVER.LR=1e30", "SOLVER.LR_SCH=none", "SOLVER.WARMUP_EPISODES=0", "CHECKPOINT.SAVE_FREQ=1",
                 "TRAIN.VAL_FREQ=0", "TRAIN.PRINT_FREQ=100")  # fmt: skip
    with pytest.raises(UserError, match="is not finite"):
        trained(tiny_dataset, tmp_path / "run", *overrides)
    weights = load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")["model"]
    assert all(value.isfinite().all() for value in weights.values())


def test_resume_without_a_checkpoint_keeps_existing_files(tiny_dataset, tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    config = tiny_config(tiny_dataset, tmp_path, "CHECKPOINT.RESUME_FROM_CHECKPOINT=true")
    with pytest.raises(UserError, match="has no checkpoint_last"):
        Learner(config).train()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_a_test_run_before_training_does_not_block_the_run_directory(run, tiny_dataset, tmp_path):
    only = [
        "TEST.ONLY_TEST=true",
        "CHECKPOINT.RESUME_FROM_CHECKPOINT=true",
        f"TEST.TEST_MODEL_PATH={run[0] / 'checkpoint_best.pt'}",
    ]
    Learner(tiny_config(tiny_dataset, tmp_path / "run", *only)).test()
    trained(tiny_dataset, tmp_path / "run", "TRAIN.TRAIN_EPISODES=2")
    assert (tmp_path / "run" / "results.json").is_file()


def test_a_test_run_with_other_settings_than_training_is_reported(run, tiny_dataset, tmp_path, capsys):
    only = ["TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={run[0] / 'checkpoint_best.pt'}", "MODEL.SEED=9"]
    assert Learner(tiny_config(tiny_dataset, tmp_path / "same", *only)).test()["differs_from_training"] == []
    assert "trained with seed 1" in capsys.readouterr().out
    changed = [*only, "DATA.IMG_NORM=false", "MODEL.DISTANCES.OTAM_LAMBDA=0.7"]
    results = Learner(tiny_config(tiny_dataset, tmp_path / "other", *changed)).test()
    assert [line.split(":")[0] for line in results["differs_from_training"]] == [
        "DATA.IMG_NORM", "MODEL.DISTANCES.OTAM_LAMBDA",
    ]  # fmt: skip
    assert "CONFIG DIFFERS FROM TRAINING" in capsys.readouterr().out


def test_test_episodes_depend_only_on_the_test_seed(tiny_dataset, tmp_path):
    digests = {
        Learner(tiny_config(tiny_dataset, tmp_path, "TEST.SEED=3", f"MODEL.SEED={seed}"))
        .data.samplers["test"]
        .digest(5)
        for seed in (1, 2)
    }
    assert len(digests) == 1


def test_impossible_episodes_of_all_splits_are_reported_together(tiny_dataset, tmp_path):
    overrides = ("TRAIN.QUERY_PER_CLASS=9", "TEST.QUERY_PER_CLASS=8")
    with pytest.raises(UserError) as error:
        Learner(tiny_config(tiny_dataset, tmp_path / "never", *overrides))
    for split in ("train_action", "val_action", "test_action"):
        assert split in str(error.value)


def test_resume_refuses_another_experiment(run, tiny_dataset, tmp_path):
    directory, _ = run
    config = tiny_config(tiny_dataset, directory, "SOLVER.LR=1e-2", "CHECKPOINT.RESUME_FROM_CHECKPOINT=true")
    with pytest.raises(UserError, match=r"cannot resume .*SOLVER\.LR was 0\.001, is 0\.01"):
        Learner(config).train()


def test_resume_without_a_checkpoint_starts_from_the_beginning(tiny_dataset, tmp_path):
    learner = trained(tiny_dataset, tmp_path / "new", "CHECKPOINT.RESUME_FROM_CHECKPOINT=true", "TRAIN.VAL_FREQ=0")
    assert load_checkpoint(learner.directory.path / "checkpoint_last.pt")["episode"] == 6


# Evaluation


@torch.no_grad()
def test_encoding_each_video_once_equals_encoding_every_episode(run, tiny_dataset):
    learner = Learner(tiny_config(tiny_dataset, run[0]))
    learner.model.eval()
    sampler, text, encoder = learner.data.samplers["test"], learner.text["test"], learner.encoder
    options = learner.data.clip_options
    found = evaluate(encoder, sampler, text, 6, ["transductive", "inductive"], ClipReader(options, 0), batch_episodes=4)
    for protocol, evaluation in found.items():
        for i in range(6):
            spec = sampler.episode(i)
            support = [encoder(VideoDataset(sampler.index, options, [v])[0][None])[0] for v in spec.support.ravel()]
            query = torch.stack([encoder(VideoDataset(sampler.index, options, [v])[0][None])[0] for v in spec.query])
            episode = Episode(
                rearrange(torch.stack(support), "(n k) t d -> 1 n k t d", n=3), query[None],
                text[torch.from_numpy(spec.class_ids)][None],
            )  # fmt: skip
            answers = learner.model.score(*episode, protocol).argmax(-1)[0].numpy()
            assert evaluation.per_episode[i] == pytest.approx((answers == spec.query_labels).mean())


def test_validation_workers_persist_between_validations(tiny_dataset, tmp_path, monkeypatch):
    real_evaluate, seen, before = main_run.evaluate, [], set(active_children())

    def watched(encoder: Encoder, sampler: EpisodeSampler, *arguments: Any) -> dict[ProtocolName, Evaluation]:
        result = real_evaluate(encoder, sampler, *arguments)
        seen.append(set(active_children()) - before)
        return result

    monkeypatch.setattr(main_run, "evaluate", watched)
    changes = ("DATA.NUM_WORKERS=1", "TRAIN.VAL_FREQ=2", "TRAIN.TRAIN_EPISODES=6", "TRAIN.PRINT_FREQ=100")
    trained(tiny_dataset, tmp_path / "run", *changes)
    assert len(seen) == 3
    assert len(seen[0]) == 2  # one reads training videos, one those of validations
    assert set.union(*seen) == seen[0]
    assert set(active_children()) == before


def test_evaluation_restores_the_mode_of_the_model(run, tiny_dataset):
    learner = Learner(tiny_config(tiny_dataset, run[0]))
    for training in (True, False):
        learner.model.train(training)
        learner._evaluate("test", 2, ["inductive"])
        assert learner.model.training is training


def test_nonfinite_scores_are_an_error(run, tiny_dataset):
    learner = Learner(tiny_config(tiny_dataset, run[0]))
    with torch.no_grad():
        next(learner.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="NaN or inf"):
        learner._evaluate("test", 2, ["inductive"])


def test_pixels_are_normalised_only_if_the_config_requires_it(run, tiny_dataset):
    model = Learner(tiny_config(tiny_dataset, run[0])).model
    seen = []
    model.encode = lambda frames: seen.append(frames) or frames  # type: ignore[method-assign]
    clips = torch.full((1, 1, 3, 2, 2), 51, dtype=torch.uint8)
    Encoder(model, torch.device("cpu"), normalise_pixels=False, amp=False)(clips)
    Encoder(model, torch.device("cpu"), normalise_pixels=True, amp=False)(clips)
    assert seen[0].unique().tolist() == pytest.approx([0.2])
    mean, std = (torch.tensor(values)[None, None, :, None, None] for values in (model.pixel_mean, model.pixel_std))
    torch.testing.assert_close(seen[1], ((0.2 - mean) / std).expand_as(seen[1]))


# Testing only, refusals


def test_only_test_reproduces_the_result_and_overwrites_nothing(run, tiny_dataset, tmp_path):
    directory, results = run
    only = ["TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={directory / 'checkpoint_best.pt'}"]
    for expected_name in ("results.json", "results_2.json"):
        again = Learner(tiny_config(tiny_dataset, tmp_path / "tests", *only)).test()
        assert (tmp_path / "tests" / expected_name).is_file()
        assert again["per_episode"] == results["per_episode"]
        assert again["accuracy_by_protocol"] == results["accuracy_by_protocol"]
        assert again["checkpoint_sha256"] == results["checkpoint_sha256"]


@pytest.mark.parametrize("protocol", ["inductive", "transductive"])
def test_a_single_protocol_is_scored_and_is_the_main_result(run, tiny_dataset, tmp_path, protocol, capsys):
    directory, results = run
    only = ["TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={directory / 'checkpoint_best.pt'}"]
    alone = Learner(tiny_config(tiny_dataset, tmp_path, *only, f"TEST.PROTOCOL={protocol}")).test()
    assert alone["accuracy_by_protocol"] == {protocol: results["accuracy_by_protocol"][protocol]}
    assert alone["protocol"] == protocol
    assert alone["accuracy"] == results["accuracy_by_protocol"][protocol]["accuracy"]
    assert f"protocol={protocol}" in capsys.readouterr().out
    assert list(Answers.load(tmp_path / alone["answers"]).scores) == [protocol]


def test_only_test_needs_no_training_data(run, tiny_dataset, tmp_path):
    only = ["TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={run[0] / 'checkpoint_best.pt'}"]
    assert set(Learner(tiny_config(tiny_dataset, tmp_path, *only)).data.splits) == {"test"}


def test_class_texts_of_the_tiny_backbone_do_not_depend_on_the_seed(run, tiny_dataset):
    texts = [Learner(tiny_config(tiny_dataset, run[0], f"MODEL.SEED={seed}")).text["test"] for seed in (1, 9)]
    assert torch.equal(*texts)


def test_a_checkpoint_of_another_architecture_is_refused_in_one_sentence(run, tiny_dataset, tmp_path):
    only = ["TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={run[0] / 'checkpoint_best.pt'}", "MODEL.PADM.ENABLED=false"]
    with pytest.raises(UserError, match="do not fit this model"):
        Learner(tiny_config(tiny_dataset, tmp_path, *only)).test()


def test_a_run_directory_is_never_overwritten(run, tiny_dataset):
    directory, _ = run
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    with pytest.raises(UserError) as error:
        Learner(tiny_config(tiny_dataset, directory)).train()
    for option in ("--resume", "CHECKPOINT.CHECKPOINT_DIR="):
        assert option in str(error.value)
    assert before == {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.mark.parametrize("change", ["DATA.IMG_SIZE=48", "MODEL.SPM.GENERATOR_HIDDEN=16"])
def test_an_incompatible_checkpoint_names_the_differing_keys(run, tiny_dataset, tmp_path, change):
    tested = (f"TEST.TEST_MODEL_PATH={run[0] / BEST}", "TEST.ONLY_TEST=true", "DATA.SHORT_SIDE=48")
    with pytest.raises(UserError, match=f"do not fit this model.*; {change.partition('=')[0]}: trained with"):
        Learner(tiny_config(tiny_dataset, tmp_path, *tested, change)).test()


def test_selection_on_the_test_split_is_marked_in_the_result(tiny_dataset, tmp_path, capsys):
    results = trained(tiny_dataset, tmp_path / "run", "TRAIN.VAL_SPLIT=test", "TRAIN.TRAIN_EPISODES=2").test()
    assert results["checkpoint_selected_on"] == "test"
    assert "SELECTED ON THE TEST SPLIT" in capsys.readouterr().out


@pytest.mark.parametrize("name", [LAST, "checkpoint_2.pt"])
def test_a_checkpoint_without_selection_is_not_reported_as_selected(tiny_dataset, tmp_path, capsys, name):
    by_test = ("TRAIN.VAL_SPLIT=test", "TRAIN.VAL_FREQ=2")
    trained(tiny_dataset, tmp_path / "run", *by_test, "TRAIN.TRAIN_EPISODES=2", "CHECKPOINT.KEEP=1")
    tested = (f"TEST.TEST_MODEL_PATH={tmp_path / 'run' / name}", "TEST.ONLY_TEST=true")
    results = Learner(tiny_config(tiny_dataset, tmp_path / "test", *by_test, *tested)).test()
    assert results["checkpoint_selected_on"] == "nothing"
    assert "SELECTED" not in capsys.readouterr().out


def test_without_training_episodes_the_weights_are_tested_as_loaded(tiny_dataset, tmp_path):
    learner = trained(tiny_dataset, tmp_path / "run", "TRAIN.TRAIN_EPISODES=0")
    results = learner.test()
    assert results["checkpoint_episodes"] == 0
    assert results["trained_parameters"] == 0
    assert ", 0 of " in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("layout", ["frames", "split_frames"])
def test_a_run_works_with_frame_folders(tiny_dataset, tmp_path, layout):
    overrides = (f"DATA.DATA_DIR={getattr(tiny_dataset, layout)}", "TRAIN.TRAIN_EPISODES=2")
    assert trained(tiny_dataset, tmp_path / "run", *overrides).test()["episodes"] == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_run_gives_the_test_accuracy_of_the_cpu(run, tiny_dataset, tmp_path):
    only = ["TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={run[0] / 'checkpoint_best.pt'}", "DEVICE.DEVICE=cuda"]
    assert Learner(tiny_config(tiny_dataset, tmp_path / "a", *only)).test()["accuracy"] == run[1]["accuracy"]
    trained(tiny_dataset, tmp_path / "b", "DEVICE.DEVICE=cuda", "USE_AMP=true").test()
