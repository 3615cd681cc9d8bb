"""A run that was stopped and resumed is bit-exact with an uninterrupted run."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from episodes.dataset import EpisodeClips
from run import stopping
from run.encoder import Encoder
from run.main_run import Learner
from run.run_directory import RunDirectory, TrainingState
from run.stopping import StopRequested, signals_handled
from run.training_step import TrainingStep
from tests.helpers.distributed_jobs import train_until
from tests.helpers.same_runs import assert_same_model, assert_same_run
from tests.helpers.shipped import ROOT
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import tiny_config, trained
from utils.checkpoint import BEST, LAST, load_checkpoint, save_checkpoint
from utils.config import config_to_dict
from utils.config_changes import check_resumed_config
from utils.errors import UserError
from utils.logs import set_up_logging

RESUME = "CHECKPOINT.RESUME_FROM_CHECKPOINT=true"
# Log lines, saves and validations at episodes that have little in common; steps of two episodes, the last of one.
ODD = ("TRAIN.TRAIN_EPISODES=11", "TRAIN.PRINT_FREQ=4", "TRAIN.VAL_FREQ=6", "CHECKPOINT.SAVE_FREQ=3")
PLUGIN = ROOT / "configs" / "tsfsar" / "demo.yaml"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Returns the number of each training episode that is used, and the sum of its pixels and mirrored clips."""
    noted: list[tuple[int, int]] = []
    add_gradient = TrainingStep.add_gradient

    def note(step: TrainingStep, clips: EpisodeClips, group_size: int) -> Any:
        noted.append((clips.index, int(clips.clips.sum()) + sum(clips.mirrored)))
        return add_gradient(step, clips, group_size)

    monkeypatch.setattr(TrainingStep, "add_gradient", note)
    return noted


@pytest.fixture(scope="module")
def whole(tiny_dataset: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the directory of the uninterrupted run."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    trained(tiny_dataset, directory, *ODD)
    return directory


def stopped(data: TinyDataset, directory: Path, signals: Callable[[pytest.MonkeyPatch], None], *overrides: str) -> str:
    """Returns the message of a run stopped by a signal; `signals` determines when it is sent."""
    learner = Learner(tiny_config(data, directory, *ODD, *overrides))
    with pytest.MonkeyPatch.context() as patches, signals_handled():
        signals(patches)
        with pytest.raises(StopRequested) as stop:
            learner.train()
    return str(stop.value)


def in_episode(number: int, signal_number: int = signal.SIGTERM) -> Callable[[pytest.MonkeyPatch], None]:
    """Returns a patch that sends a signal during a training episode."""

    def arrange(patches: pytest.MonkeyPatch) -> None:
        forward = TrainingStep.forward

        def forward_and_signal(step: TrainingStep, clips: EpisodeClips) -> Any:
            if clips.index == number:
                os.kill(os.getpid(), signal_number)
            return forward(step, clips)

        patches.setattr(TrainingStep, "forward", forward_and_signal)

    return arrange


def in_validation(patches: pytest.MonkeyPatch) -> None:
    """Returns a patch that sends a signal while the first validation, or test, encodes its videos."""
    encode = Encoder.__call__

    def encode_and_signal(encoder: Encoder, clips: torch.Tensor) -> torch.Tensor:
        if not encoder.model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(encoder, clips)

    patches.setattr(Encoder, "__call__", encode_and_signal)


# Exact


@pytest.mark.parametrize(
    ("episode", "saved", "signal_number", "workers"),
    [(2, 4, signal.SIGTERM, 0), (3, 4, signal.SIGUSR1, 1), (5, 6, signal.SIGTERM, 0), (10, 11, signal.SIGTERM, 0)],
    ids=["first_of_a_group", "last_of_a_group_with_workers", "before_a_validation", "last_episode"],
)
def test_resume_after_a_signal_is_bit_exact(
    whole, seen, tiny_dataset, tmp_path, episode, saved, signal_number, workers
):
    directory, workers_set = tmp_path / "run", f"DATA.NUM_WORKERS={workers}"
    message = stopped(tiny_dataset, directory, in_episode(episode, signal_number), workers_set)
    assert f"stopped by {signal.Signals(signal_number).name} after {saved} episodes" in message
    assert not multiprocessing.active_children()  # the workers end with the run
    assert load_checkpoint(directory / LAST)["episode"] == saved
    trained(tiny_dataset, directory, *ODD, RESUME, workers_set)
    assert_same_run(directory, whole)
    assert [index for index, _ in seen] == list(range(11))


def test_resume_with_a_plugin_and_parameter_groups_is_bit_exact(tiny_dataset, tmp_path):
    options = (
        "MODEL.SIDE={WIDTH: 16, HEAD_DIM: 8}", "MODEL.TRAINABLE=head", "MODEL.RATES={GENERATOR: 0.5, ADAPTER: 0.25}",
        "MODEL.CLASS_DROPOUT=0.5", "TRAIN.TRAIN_EPISODES=3", "TRAIN.TASKS_PER_BATCH=1", "TRAIN.VAL_FREQ=0",
        "CHECKPOINT.SAVE_FREQ=1",
    )  # fmt: skip
    trained(tiny_dataset, tmp_path / "whole", *options, file=PLUGIN)
    train_until(Learner(tiny_config(tiny_dataset, tmp_path / "run", *options, file=PLUGIN)), 1)
    trained(tiny_dataset, tmp_path / "run", *options, RESUME, file=PLUGIN)
    mine, theirs = (load_checkpoint(tmp_path / run / LAST) for run in ("run", "whole"))
    assert len(theirs["optimizer"]["param_groups"]) == 4
    assert_same_model(mine, theirs)


def test_a_resumed_run_uses_the_same_clips(seen, tiny_dataset, tmp_path):
    trained(tiny_dataset, tmp_path / "whole", *ODD, "TRAIN.VAL_FREQ=0")
    uninterrupted = seen[:]
    seen.clear()
    stopped(tiny_dataset, tmp_path / "cut", in_episode(4), "TRAIN.VAL_FREQ=0")
    trained(tiny_dataset, tmp_path / "cut", *ODD, "TRAIN.VAL_FREQ=0", RESUME, "DATA.NUM_WORKERS=2")
    assert seen == uninterrupted


def test_a_resumed_run_repeats_an_interrupted_validation(whole, tiny_dataset, tmp_path):
    message = stopped(tiny_dataset, tmp_path / "run", in_validation)
    assert "after 6 episodes" in message
    assert load_checkpoint(tmp_path / "run" / LAST)["validation_due"]
    trained(tiny_dataset, tmp_path / "run", *ODD, RESUME)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("written", [BEST, LAST, "checkpoint_6.pt"])
def test_resume_after_a_kill_between_writes_is_bit_exact(whole, tiny_dataset, tmp_path, monkeypatch, written):
    save = RunDirectory.save

    def save_and_break(files: RunDirectory, name: str, state: TrainingState) -> None:
        save(files, name, state)
        if name == written and state.episode >= 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(RunDirectory, "save", save_and_break)
        with pytest.raises(KeyboardInterrupt):
            trained(tiny_dataset, tmp_path / "cut", *ODD)
    trained(tiny_dataset, tmp_path / "cut", *ODD, RESUME)
    assert_same_run(tmp_path / "cut", whole)


def test_resume_after_a_kill_during_a_repeated_validation_is_bit_exact(whole, tiny_dataset, tmp_path, monkeypatch):
    stopped(tiny_dataset, tmp_path / "cut", in_validation)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(RunDirectory, "save_on_schedule", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tiny_dataset, tmp_path / "cut", *ODD, RESUME)
    trained(tiny_dataset, tmp_path / "cut", *ODD, RESUME)
    assert_same_run(tmp_path / "cut", whole)


# Signals


def test_a_signal_during_a_test_run_stops_it_immediately(whole, tiny_dataset, tmp_path, monkeypatch):
    only = ("TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={whole / BEST}")
    learner = Learner(tiny_config(tiny_dataset, tmp_path / "test", *only))
    in_validation(monkeypatch)
    with signals_handled(), pytest.raises(StopRequested, match="stopped by SIGTERM"):
        learner.test()
    assert not (tmp_path / "test").exists()


def test_only_a_second_separate_signal_stops_immediately(monkeypatch):
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    with signals_handled():
        with pytest.raises(StopRequested):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ends == []
        monkeypatch.setattr(stopping, "SAME_REQUEST_SECONDS", -1.0)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert ends == [128 + signal.SIGUSR1]


def test_signal_handlers_are_restored_after_a_run():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopRequested), signals_handled():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
    with stopping.deferred(str):
        pass


# Another length


def test_an_extended_run_equals_the_longer_run(tiny_dataset, tmp_path):
    schedule = ("SOLVER.LR_SCH=[4]", "TRAIN.VAL_FREQ=0")
    trained(tiny_dataset, tmp_path / "long", *schedule, "TRAIN.TRAIN_EPISODES=8")
    trained(tiny_dataset, tmp_path / "grown", *schedule, "TRAIN.TRAIN_EPISODES=6")
    trained(tiny_dataset, tmp_path / "grown", *schedule, "TRAIN.TRAIN_EPISODES=8", RESUME)
    assert_same_model(*(load_checkpoint(tmp_path / name / LAST) for name in ("grown", "long")))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("SOLVER.LR_SCH=cosine", "TRAIN.TRAIN_EPISODES=8"), "while SOLVER.LR_SCH is cosine"),
        (("SOLVER.LR_SCH=none", "TRAIN.TRAIN_EPISODES=2"), "cannot be less than the 4 that are already trained"),
    ],
)
def test_a_length_that_changes_the_run_is_refused(tiny_dataset, tmp_path, overrides, reason):
    begun = (*overrides[:1], "TRAIN.TRAIN_EPISODES=4", "TRAIN.VAL_FREQ=0")
    trained(tiny_dataset, tmp_path / "run", *begun)
    with pytest.raises(UserError, match=reason):
        trained(tiny_dataset, tmp_path / "run", *begun, *overrides, RESUME)


def test_a_run_cannot_be_shortened_below_trained_episodes(tiny_dataset, tmp_path):
    long, short = (
        tiny_config(tiny_dataset, tmp_path, "SOLVER.LR_SCH=none", f"TRAIN.TRAIN_EPISODES={length}") for length in (8, 4)
    )
    check_resumed_config(long.model_dump(), short.model_dump(), tmp_path, episode=4, validates=False)
    with pytest.raises(UserError, match=r"TRAIN\.TRAIN_EPISODES was 8, is 4"):
        check_resumed_config(long.model_dump(), short.model_dump(), tmp_path, episode=5, validates=False)


@pytest.mark.parametrize(("frequency", "length"), [(0, 4), (5, 4), (2, 6)])
def test_a_run_shortened_to_its_checkpoint_equals_the_shorter_run(tiny_dataset, tmp_path, frequency, length):
    short = (*ODD[1:2], f"TRAIN.VAL_FREQ={frequency}", "CHECKPOINT.SAVE_FREQ=0", "SOLVER.LR_SCH=none")
    stopped(tiny_dataset, tmp_path / "found", in_episode(length - 1), *short)
    trained(tiny_dataset, tmp_path / "found", *short, f"TRAIN.TRAIN_EPISODES={length}", RESUME)
    trained(tiny_dataset, tmp_path / "expected", *short, f"TRAIN.TRAIN_EPISODES={length}")
    for name in (BEST, LAST):
        found, expected = (load_checkpoint(tmp_path / run / name) for run in ("found", "expected"))
        assert_same_model(found, expected)
        assert (found["best_accuracy"], found["kept"]) == (expected["best_accuracy"], expected["kept"])


def test_extending_a_run_after_an_incomplete_group_is_reported(tiny_dataset, tmp_path, capsys):
    short = ("SOLVER.LR_SCH=none", "TRAIN.VAL_FREQ=0")
    trained(tiny_dataset, tmp_path / "run", *short, "TRAIN.TRAIN_EPISODES=3")
    trained(tiny_dataset, tmp_path / "run", *short, "TRAIN.TRAIN_EPISODES=4", RESUME)
    assert "TRAIN.TASKS_PER_BATCH" in capsys.readouterr().err


# Another task, other data


@pytest.mark.parametrize("key", ["WAY=2", "SHOT=2", "QUERY_PER_CLASS=2", "SEED=5", "PROTOCOL=transductive"])
def test_later_validations_use_the_same_episodes(tiny_dataset, tmp_path, key):
    begun = ("SOLVER.LR_SCH=none", "TRAIN.TRAIN_EPISODES=4", "TRAIN.VAL_FREQ=2")
    trained(tiny_dataset, tmp_path / "run", *begun)
    with pytest.raises(UserError, match=rf"another config \(TEST\.{key.partition('=')[0]} was"):
        trained(tiny_dataset, tmp_path / "run", *begun, "TRAIN.TRAIN_EPISODES=6", f"TEST.{key}", RESUME)
    trained(tiny_dataset, tmp_path / "run", *begun, f"TEST.{key}", RESUME)  # nothing is left to validate


def test_an_interrupted_last_validation_keeps_its_episodes(tiny_dataset, tmp_path):
    before, now = (tiny_config(tiny_dataset, tmp_path, RESUME, f"TEST.SEED={seed}") for seed in (1, 2))
    content = {"model": {}, "optimizer": {}, "config": config_to_dict(before), "episode": before.TRAIN.TRAIN_EPISODES}
    save_checkpoint(tmp_path / LAST, {**content, "validation_due": False})
    assert RunDirectory(now, {}).open()
    save_checkpoint(tmp_path / LAST, {**content, "validation_due": True})
    with pytest.raises(UserError, match=r"another config \(TEST\.SEED was 1, is 2"):
        RunDirectory(now, {}).open()
    assert RunDirectory(before, {}).open()


def test_a_run_resumes_with_a_protocol_of_equal_validations(tiny_dataset, tmp_path):
    begun = ("SOLVER.LR_SCH=none", "TRAIN.TRAIN_EPISODES=2", "TRAIN.VAL_FREQ=2")
    trained(tiny_dataset, tmp_path / "run", *begun, "TEST.PROTOCOL=inductive")
    trained(tiny_dataset, tmp_path / "run", *begun, "TRAIN.TRAIN_EPISODES=4", "TEST.PROTOCOL=both", RESUME)
    assert load_checkpoint(tmp_path / "run" / LAST)["episode"] == 4


@pytest.mark.parametrize(("change", "named"), [("class", "train split"), ("prompt", "val split"), ("flip", "mirrored")])
def test_a_run_resumes_only_with_the_same_data(own, tmp_path, change, named):
    begun = ("SOLVER.LR_SCH=none", "TRAIN.TRAIN_EPISODES=4")
    trained(own, tmp_path / "run", *begun)
    path = own.splits / "classes.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if change == "class":
        content["train"].pop()
    elif change == "prompt":
        content["val"][0]["prompt"] = "another prompt"
    else:
        content["horizontal_flip"] = not content["horizontal_flip"]
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    before = load_checkpoint(tmp_path / "run" / LAST)
    with pytest.raises(UserError, match=f"on other data .*{named}"):
        trained(own, tmp_path / "run", *begun, "TRAIN.TRAIN_EPISODES=6", RESUME)
    assert load_checkpoint(tmp_path / "run" / LAST)["episode"] == before["episode"]


def test_resuming_without_a_checkpoint_gives_a_warning(tiny_dataset, tmp_path, capsys):
    set_up_logging()
    trained(tiny_dataset, tmp_path / "run", "TRAIN.TRAIN_EPISODES=2", RESUME)
    assert f"nothing to resume in {tmp_path / 'run'}" in capsys.readouterr().err


def test_resuming_a_finished_run_encodes_nothing(tiny_dataset, tmp_path, monkeypatch):
    cached = ("MODEL.TRAINABLE=head", "TRAIN.CACHED_FEATURES=true", "TRAIN.VAL_FREQ=0")
    trained(tiny_dataset, tmp_path / "run", *cached)
    monkeypatch.setattr("run.cached_episodes.encode_videos", lambda *_: pytest.fail("videos were encoded again"))
    trained(tiny_dataset, tmp_path / "run", *cached, RESUME)


# What is kept


def test_the_newest_saves_are_kept_and_only_the_runs_own_files_are_deleted(tiny_dataset, tmp_path, monkeypatch):
    every_step = ("TRAIN.VAL_FREQ=0", "CHECKPOINT.SAVE_FREQ=2")
    foreign = tmp_path / "run" / "checkpoint_6.pt"
    save = RunDirectory.save

    def save_beside_foreign_files(files: RunDirectory, name: str, state: TrainingState) -> None:
        save(files, name, state)
        for other in (foreign, foreign.with_name("checkpoint_1.pt")):
            other.write_bytes(b"mine")

    with monkeypatch.context() as patches:
        patches.setattr(RunDirectory, "save", save_beside_foreign_files)
        trained(tiny_dataset, tmp_path / "run", *every_step, "TRAIN.TRAIN_EPISODES=10", "CHECKPOINT.KEEP=2")
    names = {path.name for path in (tmp_path / "run").glob("*.pt")}
    kept, foreigners = {"checkpoint_8.pt", "checkpoint_10.pt"}, {"checkpoint_1.pt", "checkpoint_6.pt"}
    assert names == {BEST, LAST} | kept | foreigners
    assert all((tmp_path / "run" / name).read_bytes() == b"mine" for name in foreigners)
    assert [load_checkpoint(tmp_path / "run" / f"checkpoint_{done}.pt")["episode"] for done in (8, 10)] == [8, 10]


def test_no_saves_are_kept_if_keep_is_zero(tiny_dataset, tmp_path):
    trained(tiny_dataset, tmp_path / "run", "CHECKPOINT.KEEP=0")
    assert {path.name for path in (tmp_path / "run").glob("*.pt")} == {BEST, LAST}


def test_a_checkpoint_without_training_state_is_not_resumed(whole, tiny_dataset, tmp_path):
    content = load_checkpoint(whole / LAST)
    del content["optimizer"]
    save_checkpoint(tmp_path / LAST, content)
    with pytest.raises(UserError, match=r"checkpoint_last\.pt: .*only weights"):
        trained(tiny_dataset, tmp_path, *ODD, RESUME)
    assert np.isfinite(content["best_accuracy"])


def test_an_old_checkpoint_resumes_with_defaults_of_new_keys(tiny_dataset, tmp_path):
    begun = ("SOLVER.LR_SCH=none", "TRAIN.VAL_FREQ=0", "TRAIN.TRAIN_EPISODES=4")
    trained(tiny_dataset, tmp_path / "run", *begun)
    content = load_checkpoint(tmp_path / "run" / LAST)
    del content["config"]["SOLVER"]["EPS"]
    save_checkpoint(tmp_path / "run" / LAST, content)
    with pytest.raises(UserError, match=r"another config \(SOLVER\.EPS was 1e-08, is 1e-06\)"):
        trained(tiny_dataset, tmp_path / "run", *begun, "SOLVER.EPS=1e-6", RESUME)
    trained(tiny_dataset, tmp_path / "run", *begun, "TRAIN.TRAIN_EPISODES=6", RESUME)
    assert load_checkpoint(tmp_path / "run" / LAST)["episode"] == 6
