"""Two processes give the results of one process: weights, accuracies, files and messages."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from run.main_run import Learner
from tests.helpers.distributed_jobs import train_until
from tests.helpers.processes import FILES, SGD, job, largest_difference, launched, results_of, saved, torchrun
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import DEMO, lines_of, tiny_config, trained
from utils import distributed
from utils.errors import UserError
from utils.utils import choose_device

RESUME = "CHECKPOINT.RESUME_FROM_CHECKPOINT=true"
TRAININGS = {
    "sgd": (*SGD, "TRAIN.TASKS_PER_BATCH=4", "TRAIN.TRAIN_EPISODES=8"),
    "adam_with_dropout": ("MODEL.SPM.GENERATOR_DROPOUT=0.2", "TRAIN.CLIP_GRAD=1.0", "CHECKPOINT.SAVE_FREQ=2"),
    "uneven_groups": (*SGD, "TRAIN.TASKS_PER_BATCH=3", "TRAIN.TRAIN_EPISODES=7"),
    "one_episode_a_step": (*SGD, "TRAIN.TASKS_PER_BATCH=1", "TRAIN.TRAIN_EPISODES=5", "TRAIN.PRINT_FREQ=1"),
}
TRAININGS["plugin_and_groups"] = (
    "MODEL.TRAINABLE=head", "MODEL.SIDE={WIDTH: 16, HEAD_DIM: 8}", "MODEL.RATES={GENERATOR: 0.5, ADAPTER: 0.25}",
    "MODEL.CLASS_DROPOUT=0.5", "TRAIN.TRAIN_EPISODES=4", "TRAIN.TASKS_PER_BATCH=2", "SOLVER.WARMUP_EPISODES=0",
)  # fmt: skip
TESTS = {"seven_episodes": 7, "fewer_episodes_than_processes": 1}


@pytest.fixture(scope="module")
def one(tiny_dataset: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of the runs by one process."""
    folder = tmp_path_factory.mktemp("one")
    for name, overrides in TRAININGS.items():
        trained(tiny_dataset, folder / name, *overrides, file=FILES.get(name, DEMO)).test()
    for name, episodes in TESTS.items():
        Learner(tiny_config(tiny_dataset, folder / name, *only_test(folder, episodes))).test()
    train_until(Learner(tiny_config(tiny_dataset, folder / "cut", *TRAININGS["adam_with_dropout"])), 2)
    return folder


def only_test(folder: Path, episodes: int) -> Iterable[str]:
    checkpoint = folder / "sgd" / "checkpoint_last.pt"
    return "TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={checkpoint}", f"TEST.TEST_EPISODES={episodes}"


@pytest.fixture(scope="module")
def two(one: Path, tiny_dataset: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of the same runs by two processes, started once for all of them."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(one / "cut", folder / "one_then_two")
    adam = TRAININGS["adam_with_dropout"]
    jobs = [job(tiny_dataset, folder / name, *overrides) for name, overrides in TRAININGS.items()]
    jobs += [job(tiny_dataset, folder / name, *only_test(one, episodes)) for name, episodes in TESTS.items()]
    cache = f"TEST.FEATURE_CACHE={folder / 'features'}"
    jobs += [job(tiny_dataset, folder / name, *only_test(one, 7), cache) for name in ("keeping", "kept")]
    jobs += [
        job(tiny_dataset, folder / "one_then_two", *adam, RESUME),
        job(tiny_dataset, folder / "cut", *adam, stop_after=4),
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    finished = launched("tests/helpers/distributed_jobs.py", folder / "jobs.json")
    assert finished.returncode == 0, finished.stderr
    return folder


# Training


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_the_same_weights_as_one(one, two, name):
    found, expected = saved(two / name), saved(one / name)
    assert found["episode"] == expected["episode"]
    assert largest_difference(found["model"], expected["model"]) < 1e-6


@pytest.mark.parametrize("name", TRAININGS)
def test_metrics_are_means_over_the_episodes_of_both(one, two, name):
    found, expected = ([line for line in lines_of(folder / name) if "train/loss" in line] for folder in (two, one))
    assert [line["episode"] for line in found] == [line["episode"] for line in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for key in theirs.keys() - {"train/episodes_per_second", "train/data_wait_percent"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6)


def test_a_run_of_two_processes_resumes_with_one(one, two, tiny_dataset, tmp_path):
    shutil.copytree(two / "cut", tmp_path / "run")
    assert saved(tmp_path / "run")["episode"] == 4
    learner = trained(tiny_dataset, tmp_path / "run", *TRAININGS["adam_with_dropout"], RESUME)
    assert largest_difference(learner.model.state_dict(), saved(one / "adam_with_dropout")["model"]) < 1e-6


def test_a_run_of_one_process_resumes_with_two(one, two):
    found, expected = saved(two / "one_then_two"), saved(one / "adam_with_dropout")
    assert found["episode"] == expected["episode"] == 6
    assert largest_difference(found["model"], expected["model"]) < 1e-6


# Evaluation


@pytest.mark.parametrize("name", TESTS)
def test_every_episode_is_scored_once_as_by_one_process(one, two, name):
    found, expected = results_of(two / name), results_of(one / name)
    assert found["episodes"] == len(found["per_episode"]) == TESTS[name]
    for key in ("per_episode", "accuracy_by_protocol", "per_class", "episode_list_sha256", "checkpoint_sha256"):
        assert found[key] == expected[key]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shares_cover_all_episodes_round_robin(monkeypatch, ranks):
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.share(range(3, 12)))
        assert all(i % ranks == rank for i in shares[-1])
    assert sorted(i for share in shares for i in share) == list(range(3, 12))


# The parts


def test_distributed_functions_work_with_two_processes(two):
    parts = json.loads((two / "parts.json").read_text(encoding="utf-8"))
    assert parts["order"] == [f"item {i}" for i in range(5)]
    assert parts["few"] == ["item 0"]
    assert parts["rows"] == [[0.0], [1.0], [2.0], [3.0]]
    assert parts["gradients"] == [[3.0] * 4, [5.0] * 4, None]
    assert parts["same_memory_format"] == [True, True]
    assert parts["sum"] == [3.0, 3.0]
    assert parts["mean"] == 5.0
    assert parts["constant"] == "-inf"
    assert parts["weights"] == [3.0, 3.0]
    assert parts["from_main"] == ["made by 0", "made by 0"]
    assert parts["seen_after_save"] == [True, True]


def test_each_process_uses_the_gpu_of_its_rank(monkeypatch):
    taken: list[int] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert taken == [1, 1]
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="nproc_per_node=2"):
        choose_device("cuda")


# Files and messages


def test_only_the_first_process_writes(one, two):
    assert not list(two.glob("*_of_process_*"))
    for name in (*TRAININGS, *TESTS):
        assert {path.name for path in (two / name).iterdir()} == {path.name for path in (one / name).iterdir()}
    run = two / "sgd"
    assert len({path.name.split(".")[-2] for path in (run / "tensorboard").iterdir()}) == 1  # their process
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert log.count("2 processes share the episodes") == 1
    assert log.count("validation after 4 episodes") == 1


def test_idle_processes_are_reported(two):
    assert "only 1 of 2 processes" in (two / "one_episode_a_step" / "log.txt").read_text(encoding="utf-8")
    assert "only" not in (two / "sgd" / "log.txt").read_text(encoding="utf-8")


def sentence_of(finished: subprocess.CompletedProcess[str]) -> str:
    """Returns the error of a run by two processes, which is printed once, above torchrun's report."""
    assert finished.returncode == 1, finished.stderr  # torchrun's
    assert set(re.findall(r"exitcode *: (-?\d+)", finished.stderr)) <= {
        "2",
        "75",
        "-15",
    }  # of the first failure; SIGTERM
    assert "(exitcode: 2)" in finished.stderr
    (sentence,) = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert finished.stderr.count("Traceback") == 1  # torchrun's
    return sentence


def test_an_error_in_all_processes_is_reported_in_one_sentence():
    assert "TRAIN.SHOT" in sentence_of(torchrun("run/run.py", "--cfg", DEMO, "TRAIN.SHOTS=1"))


def test_a_broken_video_in_one_process_is_reported_in_one_sentence(tiny_dataset, tmp_path):
    learner = Learner(tiny_config(tiny_dataset, tmp_path / "unused"))
    sampler = learner.data.samplers["train"]
    first, second = ({*spec.support.ravel(), *spec.query} for spec in (sampler.episode(0), sampler.episode(1)))
    broken = sampler.index.path(min(second - first)).relative_to(tiny_dataset.videos)
    shutil.copytree(tiny_dataset.videos, tmp_path / "videos")
    (tmp_path / "videos" / broken).write_bytes(b"not a video")
    config = job(tiny_dataset, tmp_path / "run")["config"]
    overrides = [f"DATA.DATA_DIR={tmp_path / 'videos'}", "DATA.CHECK_VIDEOS=false", "DATA.MAX_BAD_CLIPS=0"]
    assert str(broken) in sentence_of(torchrun("run/run.py", "--cfg", config, *overrides))


def test_two_processes_store_and_use_features(one, two):
    expected = results_of(one / "seven_episodes")
    assert sorted(path.suffix for path in (two / "features").iterdir()) == [".json", ".lock", ".npy"]
    for name in ("keeping", "kept"):
        assert results_of(two / name)["per_episode"] == expected["per_episode"]
