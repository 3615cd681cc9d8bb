"""Every task that makes sense runs: test-only data, two classes, few validation classes, unused parts unchecked."""

import shutil
from pathlib import Path

import pytest
import yaml

import models
from run.data import RunData
from run.main_run import Learner
from run.profiler import write_profile
from tests.helpers.split_files import change_class_file
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import tiny_config, trained
from utils.checkpoint import BEST, LAST, load_checkpoint
from utils.config import load_config
from utils.errors import UserError
from utils.schema import Config

NO_TRAINING = "TRAIN.TRAIN_EPISODES=0"


def keep_test_classes(data: TinyDataset, count: int) -> None:
    """Leaves only some test classes, on disk and in the class file, which then has no key for train and val."""
    content = yaml.safe_load((data.splits / "classes.yaml").read_text())
    content["test"] = content["test"][:count]
    del content["train"], content["val"]
    (data.splits / "classes.yaml").write_text(yaml.safe_dump(content))
    kept = {entry["folder"] for entry in content["test"]}
    for folder in data.videos.iterdir():
        if folder.name not in kept:
            shutil.rmtree(folder)


def config_of(method: str, data: TinyDataset, directory: Path, *overrides: str) -> Config:
    """Returns `tiny_config` for another method."""
    small = tiny_config(data, directory, *overrides)
    options = models.options_of(method)(NAME=method, BACKBONE="tiny", CLIP_WEIGHTS="random", SEED=1)
    return small.model_copy(update={"MODEL": options})


# Test-only data


def test_two_class_test_only_data_runs_without_training(own, tmp_path, tiny_dataset):
    trained(tiny_dataset, tmp_path / "train", "TRAIN.TRAIN_EPISODES=2")
    keep_test_classes(own, 2)
    only_test = ("TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={tmp_path / 'train' / BEST}")
    two_way = ("TEST.WAY=2", "TEST.SHOT=2")

    results = Learner(tiny_config(own, tmp_path / "only", *two_way, *only_test)).test()
    assert (results["way"], results["shot"], len(results["per_class"])) == (2, 2, 2)
    for name, config in {
        "otam": config_of("otam", own, tmp_path / "otam", *two_way, NO_TRAINING),
        "zeroshot": config_of("zeroshot", own, tmp_path / "zeroshot", *two_way, "TRAIN.TRAIN_EPISODES=6"),
    }.items():
        learner = Learner(config)
        assert set(learner.data.splits) == {"test"}
        learner.train()
        results = learner.test()
        assert (results["method"], results["way"], results["checkpoint_episodes"]) == (name, 2, 0)


def test_training_without_train_classes_names_the_file_and_how_to_test(own, tmp_path):
    change_class_file(own.splits, lambda content: content.update(train=None, val=[]))
    with pytest.raises(UserError) as refused:
        Learner(tiny_config(own, tmp_path / "run"))
    problems = str(refused.value).splitlines()
    assert [split for split in ("train", "val") for line in problems if f"'{split}:'" in line] == ["train", "val"]
    assert all(str(own.splits / "classes.yaml") in line for line in problems)
    for line, remedy in zip(problems, ("TRAIN.TRAIN_EPISODES=0", "TRAIN.VAL_FREQ=0"), strict=True):
        assert remedy in line
    assert not (tmp_path / "run").exists()


def test_an_untrained_run_is_resumed_with_training_episodes(own, tmp_path):
    trained(own, tmp_path / "run", NO_TRAINING, "SOLVER.LR_SCH=none")
    trained(own, tmp_path / "run", "TRAIN.TRAIN_EPISODES=2", "SOLVER.LR_SCH=none",
            "CHECKPOINT.RESUME_FROM_CHECKPOINT=true")  # fmt: skip
    assert load_checkpoint(tmp_path / "run" / LAST)["episode"] == 2


# The way of validation episodes


def test_too_few_val_classes_reduce_the_validation_ways(own, tmp_path):
    change_class_file(own.splits, lambda content: content["val"].pop())
    five_way = ("TRAIN.WAY=5", "TRAIN.TRAIN_EPISODES=2", "TRAIN.VAL_FREQ=2")
    learner = trained(own, tmp_path / "run", *five_way)
    assert {name: sampler.way for name, sampler in learner.data.samplers.items()} == {"train": 5, "val": 4, "test": 5}
    assert "validation is 4-way" in (tmp_path / "run" / "log.txt").read_text()
    assert learner.test()["way"] == 5
    assert Learner(tiny_config(own, tmp_path / "b", *five_way, "TRAIN.VAL_WAY=3")).data.samplers["val"].way == 3
    with pytest.raises(UserError, match=r"val of tiny has 4 classes.*TRAIN\.VAL_WAY"):
        Learner(tiny_config(own, tmp_path / "c", *five_way, "TRAIN.VAL_WAY=5"))


def test_validation_uses_the_test_ways_if_possible(tiny_dataset, tmp_path):
    for overrides, way in {("TRAIN.WAY=3",): 3, ("TRAIN.WAY=3", "TEST.WAY=5"): 5, ("TEST.WAY=2",): 2}.items():
        assert Learner(tiny_config(tiny_dataset, tmp_path, *overrides)).data.samplers["val"].way == way


@pytest.mark.parametrize("classes", [2, 3])
def test_all_of_few_val_classes_are_in_each_validation_episode(classes, own, tmp_path):
    change_class_file(own.splits, lambda content: content.update(val=content["val"][:classes]))
    assert Learner(tiny_config(own, tmp_path / "run", "TRAIN.WAY=5")).data.samplers["val"].way == classes
    with pytest.raises(UserError, match=r"TRAIN\.VAL_WAY.*at least 2, found 1"):
        tiny_config(own, tmp_path / "run", "TRAIN.VAL_WAY=1")


def test_one_val_class_is_refused_with_an_alternative(own, tmp_path):
    change_class_file(own.splits, lambda content: content.update(val=content["val"][:1]))
    with pytest.raises(UserError, match=r"val of tiny has 1 class,.*TRAIN\.VAL_FREQ=0"):
        Learner(tiny_config(own, tmp_path / "run"))
    assert Learner(tiny_config(own, tmp_path / "run", "TRAIN.VAL_FREQ=0"))


# Unused data is not checked


def test_an_untrained_run_does_not_read_train_and_val(own, tmp_path):
    change_class_file(own.splits, lambda content: content.update(train="none yet", val=[{"folder": "v"}]))
    for folder in own.videos.glob("train_*"):
        shutil.rmtree(folder)
    assert Learner(tiny_config(own, tmp_path / "run", NO_TRAINING)).test
    with pytest.raises(UserError) as refused:
        Learner(tiny_config(own, tmp_path / "run"))
    assert "'train:'" in str(refused.value)


def test_contradictory_training_settings_matter_only_in_training():
    training_only = ("TRAIN.CACHED_FEATURES=true", "TRAIN.CHUNK=2", "MODEL.FREEZE_BN=false")
    only_test = ("TEST.ONLY_TEST=true", "TEST.TEST_MODEL_PATH=x.pt")
    for without in ((NO_TRAINING,), only_test):
        assert load_config("configs/clipspm/demo.yaml", [*training_only, *without])
    with pytest.raises(UserError) as refused:
        load_config("configs/clipspm/demo.yaml", training_only)
    assert {"TRAIN.CACHED_FEATURES", "TRAIN.CHUNK"} <= set(str(refused.value).replace(":", " ").split())


def test_profiling_a_run_without_training_is_refused(tiny_dataset, tmp_path):
    with pytest.raises(UserError, match=r"--profile .*TRAIN\.TRAIN_EPISODES"):
        write_profile(Learner(tiny_config(tiny_dataset, tmp_path / "run", NO_TRAINING)), 1)
    assert not (tmp_path / "run").exists()


def test_an_impossible_episode_is_refused_before_anything_is_written(tiny_dataset, tmp_path):
    with pytest.raises(UserError, match=r"has 6 videos, an episode of 5 shots and 4 queries per class needs 9"):
        Learner(tiny_config(tiny_dataset, tmp_path / "never", "TRAIN.SHOT=5", "TRAIN.QUERY_PER_CLASS=4"))
    assert not (tmp_path / "never").exists()


# Keys of one part of a run


def test_each_part_of_a_run_has_its_own_numbers_of_queries(tiny_dataset, tmp_path):
    samplers = RunData(
        tiny_config(tiny_dataset, tmp_path, "TRAIN.QUERY_PER_CLASS=3", "TEST.QUERY_PER_CLASS=2")
    ).samplers
    found = {name: sampler.query_per_class for name, sampler in samplers.items()}
    assert found == {"train": 3, "val": 2, "test": 2}


@pytest.mark.parametrize("of_the_split", [True, False])
def test_clips_are_mirrored_as_the_split_allows_unless_the_config_decides(of_the_split, own, tmp_path):
    change_class_file(own.splits, lambda content: content.update(horizontal_flip=of_the_split))
    for key, expected in {"null": of_the_split, "true": True, "false": False}.items():
        assert RunData(tiny_config(own, tmp_path, f"DATA.FLIP={key}")).clip_options.flip is expected
