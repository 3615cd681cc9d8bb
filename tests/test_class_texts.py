"""Prompts that cannot separate two classes are refused, and truncated ones are reported, before a run starts."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import fsar
import models
from models.base import FewShotModel
from models.text import TEMPLATES, check_class_texts
from run.main_run import Learner
from tests.helpers.shipped import ROOT
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import tiny_config
from utils.config import load_config
from utils.errors import UserError

LONG = "person takes a " + 80 * "very " + "hot pan"
TINY = {"BACKBONE": "tiny", "CLIP_WEIGHTS": "random"}


@pytest.fixture(scope="module", params=TEMPLATES)
def model(request: pytest.FixtureRequest) -> FewShotModel:
    return models.build("cpm2c", 32, TEXT_TEMPLATES=request.param, **TINY)


def class_texts(model: FewShotModel, prompts: dict[str, str], source: str) -> Tensor:
    features = model.class_text(list(prompts.values()))
    check_class_texts(model, prompts, source, features)
    return features


def refusal(model: FewShotModel, prompts: dict[str, str]) -> str:
    with pytest.raises(UserError) as refused:
        class_texts(model, prompts, "test")
    return str(refused.value)


def prompts_of(data: TinyDataset, split: str, *prompts: str) -> None:
    """Gives the first classes of a split these prompts."""
    file = data.splits / "classes.yaml"
    content = yaml.safe_load(file.read_text())
    for entry, prompt in zip(content[split], prompts, strict=False):
        entry["prompt"] = prompt
    file.write_text(yaml.safe_dump(content))


# Which prompts


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("jump", "jump"),
        ("jump", "Jump "),
        ("jump  high", "jump\thigh"),
        (f"{LONG} and puts it down", f"{LONG} and throws it away"),
        ("salt &amp; pepper", "salt & pepper"),
    ],
    ids=["equal", "case and space", "spaces", "cut", "markup"],
)
def test_two_classes_with_the_same_text_are_refused(model, first, second):
    message = refusal(model, {"one": first, "between": "run", "other": second})
    assert "'one'" in message
    assert "'other'" in message
    assert "between" not in message
    assert "\n" not in message


def test_the_message_names_the_cause(model):
    assert "case and spaces" in refusal(model, {"one": "jump", "other": "JUMP"})
    assert "cut off" in refusal(model, {"one": f"{LONG} a", "other": f"{LONG} b"})
    assert "both prompts are 'jump'" in refusal(model, {"one": "jump", "other": "jump"})
    assert len(refusal(model, {"one": f"{LONG} a", "other": f"{LONG} b"})) < 600
    several = refusal(model, {"one": "jump", "two": "jump", "three": "jump"})
    assert "'one' and 'two'" in several
    assert "'one' and 'three'" in several
    assert "'two' and 'three'" not in several


@pytest.mark.parametrize("prompt", ["", "  ", "\t\n", "\u200b", "\u00a0", "...", "_-/", "\u3002", "{}"])
def test_an_empty_prompt_is_refused_with_its_class(model, prompt):
    message = refusal(model, {"one": "jump", "other": prompt})
    assert "'other'" in message
    assert "word" in message
    assert "'one'" not in message


def test_each_problem_has_a_line_and_a_long_list_is_cut(model):
    message = refusal(model, {"a": "", "b": "", "c": "jump", "d": "jump", "e": "JUMP"})
    assert len(message.splitlines()) == 4
    many = refusal(model, {f"class_{number}": "" for number in range(30)})
    assert len(many.splitlines()) == 11
    assert "20 more" in many


def test_a_truncated_prompt_is_reported_and_allowed(model, caplog):
    prompts = {"short": "jump", "cut_class": f"{LONG} and puts it down", "other": f"{LONG}."[20:60]}
    class_texts(model, prompts, "test")
    (warning,) = caplog.messages
    assert "cut_class" in warning
    assert "short" not in warning
    assert "other" not in warning


@pytest.mark.parametrize("templates", TEMPLATES)
def test_a_prompt_is_truncated_at_the_first_excess_token(templates):
    clip = models.build("cpm2c", 32, TEXT_TEMPLATES=templates, **TINY)
    longest = max(len(clip.clip._tokenize.encode(template.replace("{}", ""))) for template in TEMPLATES[templates])
    room = 77 - 2 - longest  # a token at either end
    assert clip.cut_prompts(["very " * room, "very " * (room + 1)]) == [False, True]


# Equal features of different prompts


def with_features(features: Tensor) -> FewShotModel:
    class Fixed(models.method_class("zeroshot")):  # type: ignore[misc]
        def class_text(self, prompt_names: Sequence[str]) -> Tensor:
            return features

    return Fixed(Fixed.Options(**TINY), 32)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_features_equal_to_a_millionth_count_as_equal_at_any_norm(scale):
    features = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    features[2] = features[0] * (1 + 1e-6)
    message = refusal(with_features(scale * features), {"one": "jump", "between": "run", "other": "walk"})
    assert "'one' and 'other'" in message
    features[2] = features[0] * (1 + 1e-3)
    class_texts(with_features(scale * features), {"one": "jump", "between": "run", "other": "walk"}, "test")


def test_the_end_of_prompts_is_the_cause_only_if_both_are_cut():
    model = with_features(torch.ones(2, 64))
    assert "cut off" in refusal(model, {"one": f"{LONG} a", "other": f"{LONG} b"})
    assert "cut off" not in refusal(model, {"one": LONG, "other": "jump"})
    assert "cut off" not in refusal(model, {"one": "jump", "other": LONG})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_features_are_refused_with_their_class(value):
    features = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    features[1, 3] = value
    message = refusal(with_features(features), {"one": "jump", "ruined": "run", "other": "walk"})
    assert "ruined" in message
    assert "'one'" not in message
    assert len(message.splitlines()) == 1


def test_prompts_may_use_any_script(model):
    class_texts(model, {"one": "\u8df3", "other": "\u0431\u0435\u0433", "third": "\U0001f3c3", "fourth": "7"}, "test")


def test_a_text_tower_that_returns_zeros_is_refused():
    assert "'one' and 'other'" in refusal(with_features(torch.zeros(2, 64)), {"one": "jump", "other": "walk"})


@pytest.mark.parametrize("method", ["otam", "a2m2"])
def test_a_method_without_text_accepts_any_prompts(method, caplog):
    model = models.build(method, 64, **TINY)
    caplog.clear()  # open_clip logs while the model is built
    assert class_texts(model, {"one": "", "other": "", "long": LONG}, "test").shape == (3, 1)
    assert not caplog.messages


@pytest.mark.parametrize("folder", [path.parent.name for path in ROOT.glob("splits/*/classes.yaml")])
def test_benchmark_prompts_are_accepted_and_not_truncated(model, folder, caplog):
    content = yaml.safe_load((ROOT / "splits" / folder / "classes.yaml").read_text(encoding="utf-8"))
    for split in ("train", "val", "test"):
        class_texts(model, {entry["folder"]: entry["prompt"] for entry in content[split]}, split)
    assert not caplog.messages


# Where they are checked


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_run_is_refused_before_anything_is_written(own, tmp_path, split):
    prompts_of(own, split, "jump", "Jump")
    with pytest.raises(UserError) as refused:
        Learner(tiny_config(own, tmp_path / "run"))
    for part in ("classes.yaml", f"'{split}_action_0'", f"'{split}_action_1'"):
        assert part in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_unused_prompts_are_not_checked(own, tmp_path):
    prompts_of(own, "train", "jump", "jump")
    prompts_of(own, "val", "", "jump")
    prompts_of(own, "test", "wave", "jump")
    (checkpoint := tmp_path / "x.pt").touch()
    Learner(tiny_config(own, tmp_path / "run", "TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={checkpoint}"))


def test_the_same_prompt_in_two_splits_is_accepted(own, tmp_path):
    prompts_of(own, "train", "jump")
    prompts_of(own, "test", "jump")
    Learner(tiny_config(own, tmp_path / "run"))


def test_otam_runs_with_equal_prompts(own, tmp_path):
    prompts_of(own, "test", "jump", "jump", "")
    base = tiny_config(own, tmp_path / "run")
    overrides = [f"DATA.{key}={getattr(base.DATA, key)}" for key in ("DATA_DIR", "SPLIT_DIR", "IMG_SIZE", "SHORT_SIDE")]
    few = ["DATA.DATASET=tiny", "TRAIN.WAY=3", "TRAIN.QUERY_PER_CLASS=1", "DATA.NUM_WORKERS=0", "DEVICE.DEVICE=cpu"]
    Learner(load_config(ROOT / "configs/otam/demo.yaml", [*overrides, *few]).config)


def test_the_python_api_refuses_equal_texts(tmp_path):
    clip = np.zeros((8, 32, 32, 3), np.uint8)
    classifier = fsar.Classifier(models.build("zeroshot", 32, **TINY), "cpu")
    with pytest.raises(UserError, match="'hop' and 'jump'"):
        classifier.fit({"hop": [clip], "jump": [clip]}, {"hop": "Jump"})
    classifier.fit({"hop": [clip], "jump": [clip]})
