"""Automatic speed-ups: cached texts and checks of the first start, and the number of episodes per call."""

import logging
import os
import shutil
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fsar
import models
from episodes import checks
from episodes.sampler import EpisodeSampler
from episodes.splits import load_splits
from models.base import FewShotModel
from models.clip_fsar import ClipTowers
from run import feature_cache
from run.data import RunData, check_record
from run.evaluation import CACHED_BYTES, MAX_EPISODES, fast_batch, score_episodes
from run.export import text_features
from run.feature_cache import ClassTexts
from run.features import FeatureBank
from tests.helpers.sweeps import in_child
from tests.helpers.tiny_dataset import TINY_FRAMES, TinyDataset
from tests.helpers.tiny_runs import tiny_config
from utils.errors import UserError
from utils.files import CACHE_VARIABLE

PROMPTS = ["ride bike", "wave"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Returns the classes that the text tower encodes."""
    encoded: list[list[str]] = []
    class_text = ClipTowers.class_text

    def noted(tower: ClipTowers, sentences, prompts) -> torch.Tensor:
        encoded.append(list(prompts))
        return class_text(tower, sentences, prompts)

    monkeypatch.setattr(ClipTowers, "class_text", noted)
    return encoded


def build(method: str = "clipfsar", **options: object) -> FewShotModel:
    torch.manual_seed(0)
    return models.build(method, 64, **{"BACKBONE": "tiny", "CLIP_WEIGHTS": "random", **options})


def kept(model: FewShotModel, prompts: list[str]) -> torch.Tensor:
    return ClassTexts(model).features({prompt: prompt for prompt in prompts}, "classes")


def test_a_second_start_does_not_run_the_text_tower(texts):
    first, second = (kept(build(), PROMPTS) for _ in range(2))
    assert texts == [PROMPTS]
    assert torch.equal(first, second)
    assert torch.equal(first, build().class_text(PROMPTS))
    assert second.dtype == torch.float32


def classify(model: FewShotModel) -> torch.Tensor:
    clip = np.zeros((8, 64, 64, 3), dtype=np.uint8)
    return fsar.Classifier(model, "cpu").fit({prompt: [clip] for prompt in PROMPTS}).predict([clip]).scores


def exported(model: FewShotModel) -> torch.Tensor:
    return torch.from_numpy(text_features(model, {prompt: prompt for prompt in PROMPTS}))


@pytest.mark.parametrize("use", [classify, exported])
def test_texts_of_a_run_serve_the_other_commands(use: Callable[[FewShotModel], torch.Tensor], texts):
    kept(build(), PROMPTS)
    from_file = use(build())
    assert texts == [PROMPTS]
    assert torch.equal(from_file, use(build()))


def test_all_splits_need_one_digest_of_the_weights(monkeypatch):
    digests: list[int] = []
    monkeypatch.setattr(feature_cache, "tensors_digest", lambda weights: digests.append(1) or "digest")
    texts_of_model = ClassTexts(build())
    for prompts in (PROMPTS, PROMPTS[:1]):
        texts_of_model.features({prompt: prompt for prompt in prompts}, "classes")
    assert digests == [1]


def test_texts_of_a_class_from_a_notebook_are_not_cached(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "cell", types.ModuleType("cell"))
    model = build()
    model.__class__ = type("Own", (type(model),), {"__module__": "cell"})
    assert torch.equal(kept(model, PROMPTS), build().class_text(PROMPTS))
    assert not cache.exists()


def test_of_runs_that_start_together_one_encodes_the_texts(texts, tmp_path, monkeypatch):
    expected = build().class_text(PROMPTS)
    texts.clear()
    counted, begun = ClipTowers.class_text, tmp_path / "begun"

    def slow(*arguments) -> torch.Tensor:
        begun.touch()
        time.sleep(1)
        return counted(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ClipTowers, "class_text", slow)
        child = in_child(lambda: kept(build(), PROMPTS) is None, tmp_path / "log.txt")
    while not begun.exists():
        time.sleep(0.01)
    assert torch.equal(kept(build(), PROMPTS), expected)
    assert texts == []
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, (tmp_path / "log.txt").read_text()


def test_methods_on_the_same_text_tower_share_the_features(texts):
    templates = {"TEXT_TEMPLATES": "photo", "TEXT_NORMALISE": "none"}
    first, second = (kept(build(method, **templates), PROMPTS) for method in ("clipfsar", "clipspm"))
    assert len(texts) == 1
    assert torch.equal(first, second)


def other_weights() -> FewShotModel:
    model = build()
    with torch.no_grad():
        model.clip._text_tower[0].token_embedding.weight[:] += 1e-3
    return model


@pytest.mark.parametrize(
    ("other", "prompts"),
    [
        (other_weights, PROMPTS),
        (lambda: build(TEXT_TEMPLATES="actionclip16"), PROMPTS),
        (lambda: build(TEXT_NORMALISE="each+mean"), PROMPTS),
        (build, ["ride bike", "waving"]),
        (build, PROMPTS[::-1]),
    ],
)
def test_other_weights_templates_and_prompts_are_encoded(texts, other: Callable[[], FewShotModel], prompts):
    kept(build(), PROMPTS)
    found = kept(other(), prompts)
    assert texts == [PROMPTS, prompts]
    assert torch.equal(found, other().class_text(prompts))


def test_a_damaged_file_is_recomputed_with_a_warning(texts, cache, caplog):
    first = kept(build(), PROMPTS)
    (path,) = cache.glob("*.npy")
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        second = kept(build(), PROMPTS)
    assert str(path) in caplog.text
    assert len(texts) == 2
    assert torch.equal(first, second)
    kept(build(), PROMPTS)
    assert len(texts) == 2
    assert [file.suffix for file in sorted(cache.iterdir())] == [".json", ".lock", ".npy"]


def test_an_unwritable_cache_gives_a_warning(texts, cache, caplog):
    cache.write_text("a file")
    for _ in range(2):
        assert torch.equal(kept(build(), PROMPTS), build().class_text(PROMPTS))
    assert str(cache) in caplog.text


def test_cheap_texts_are_not_cached(cache):
    kept(build("otam"), PROMPTS)
    assert not cache.exists()


# --- the check of videos ------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Returns the videos that the check opens."""
    paths: list[Path] = []
    probe = checks.probe

    def noted(path: Path, enough: int) -> int:
        paths.append(path)
        return probe(path, enough)

    monkeypatch.setattr(checks, "probe", noted)
    return paths


def check(data: TinyDataset, folder: Path, tmp_path: Path) -> None:
    RunData(tiny_config(data, tmp_path / "run", f"DATA.DATA_DIR={folder}", "DATA.CHECK_VIDEOS=true"))


def test_an_unchanged_store_is_checked_once(tiny_dataset, tiny_packed, tmp_path, opened):
    stores = shutil.copytree(tiny_packed, tmp_path / "stores")
    check(tiny_dataset, stores, tmp_path)
    videos = len(opened)
    check(tiny_dataset, stores, tmp_path)
    assert len(opened) == videos > 0
    for moment, changed in ((1, "train"), (2, "test")):
        os.utime(stores / f"{changed}.sqlite", (moment, moment))
        check(tiny_dataset, stores, tmp_path)
    assert len(opened) == 3 * videos
    check(tiny_dataset, tiny_packed, tmp_path)  # another folder
    assert len(opened) == 4 * videos


def test_changed_video_files_are_rechecked(own, tmp_path, opened):
    for _ in range(2):
        check(own, own.videos, tmp_path)
    videos = len(opened)
    path = opened[0]
    path.write_bytes(path.read_bytes()[:100])
    for _ in range(2):  # a problem is not remembered
        with pytest.raises(UserError, match=path.name):
            check(own, own.videos, tmp_path)
    assert len(opened) == 3 * videos


def test_the_second_start_logs_short_videos(tiny_dataset, tiny_packed, opened, caplog):
    index = load_splits(tiny_dataset.splits, tiny_packed, ["test"])["test"]
    record = check_record([index], TINY_FRAMES + 1)
    with caplog.at_level(logging.INFO, logger="episodes.checks"):
        for _ in range(2):
            assert checks.unreadable_videos([index], TINY_FRAMES + 1, 1, record) == []
    assert len(opened) == 30
    first, second = caplog.messages
    assert first == second
    assert "30 of 30" in first
    assert record != check_record([index], TINY_FRAMES)
    record.write_text("not JSON")
    checks.unreadable_videos([index], TINY_FRAMES + 1, 1, record)
    assert len(opened) == 60


def test_folders_of_frames_are_checked_at_each_start(tiny_dataset):
    index = load_splits(tiny_dataset.splits, tiny_dataset.frames, ["test"])["test"]
    assert check_record([index], 4) is None


# --- the size of a scoring call -----------------------------------------------------------------------------


def bank(*shape: int) -> FeatureBank:
    return FeatureBank(torch.rand(30, *shape), np.arange(30))


def test_the_episodes_of_a_call_fit_the_cpu_cache(tiny_dataset):
    sampler = EpisodeSampler(load_splits(tiny_dataset.splits, tiny_dataset.frames, ["test"])["test"], 5, 2, 1, seed=1)
    spec, cpu = sampler.episode(0), torch.device("cpu")
    floats = CACHED_BYTES // 4 // 10
    assert fast_batch(spec, bank(floats // 100), bank(floats // 50), cpu) == 50  # 10 supports, 5 queries
    assert fast_batch(spec, bank(floats // 2), bank(floats), cpu) == 1
    assert fast_batch(spec, bank(10 * floats), bank(10 * floats), cpu) == 1
    assert fast_batch(spec, bank(floats), bank(floats), torch.device("meta")) == MAX_EPISODES
    model = build("clipspm").eval()
    features, text = bank(8, model.clip.width), torch.rand(5, model.clip.width)
    specs = [sampler.episode(i) for i in range(7)]
    scores = {
        size: score_episodes(model, specs, features, features, text, ["inductive"], size)["inductive"]
        for size in (0, 1, 3)
    }
    assert [[len(part) for part in scores[size]] for size in (1, 3)] == [[1] * 7, [3, 3, 1]]
    for size in (1, 3):
        torch.testing.assert_close(torch.cat(scores[0]), torch.cat(scores[size]), rtol=1e-5, atol=1e-5)
