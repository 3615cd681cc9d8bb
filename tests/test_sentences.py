"""Class descriptions from a user's file replace the templates, and errors in the file are reported."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import models
from models.sentences import ClassSentences, TextOptions, read_sentences
from run.main_run import Learner
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import tiny_config, trained
from utils.checkpoint import LAST, load_checkpoint
from utils.errors import UserError

TINY = {"BACKBONE": "tiny", "CLIP_WEIGHTS": "random"}
DESCRIBED = {"ride_bike": ["a person pedals", "a rider steers a bike"], "Push up": "arms stretch and bend"}


def file_of(folder: Path, content: object, name: str = "texts.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_sentences_are_matched_by_the_letters_of_class_names(tmp_path):
    options = TextOptions(TEXT_FILE=str(file_of(tmp_path, DESCRIBED)))
    found = ClassSentences(options).of(["push-up", "RideBike"])
    assert found == [["arms stretch and bend"], ["a person pedals", "a rider steers a bike"]]
    assert ClassSentences(TextOptions(TEXT_TEMPLATES="photo")).of(["clap"]) == [["a photo of clap"]]


def test_yaml_and_json_files_are_equivalent(tmp_path):
    text = "ride_bike: [a person pedals, 'a rider steers a bike']\nSt. Bernard: |\n  a dog\n  barks\n"
    assert read_sentences(file_of(tmp_path, text, "texts.yaml")) == {
        "ride_bike": DESCRIBED["ride_bike"],
        "St. Bernard": ["a dog\nbarks\n"],
    }
    indented = json.dumps({"jump": ["\U0001f3c3 jumps"]}, indent="\t")  # neither is YAML
    assert read_sentences(file_of(tmp_path, indented)) == {"jump": ["\U0001f3c3 jumps"]}


@pytest.mark.parametrize("normalise", ["none", "each", "each+mean"])
def test_a_class_feature_is_the_mean_of_its_sentences(normalise, tmp_path):
    options = {"TEXT_FILE": str(file_of(tmp_path, DESCRIBED)), "TEXT_NORMALISE": normalise}
    model = models.build("zeroshot", 32, **options, **TINY)
    clip, encode = model.clip._text_tower[0], model.clip._tokenize
    for name, sentences in (("ride bike", DESCRIBED["ride_bike"]), ("push up", [DESCRIBED["Push up"]])):
        with torch.no_grad():
            rows = [clip.encode_text(encode([sentence]))[0] for sentence in sentences]
        rows = [row / row.norm() for row in rows] if normalise != "none" else rows
        expected = sum(rows) / len(rows)
        expected = F.normalize(expected, dim=0) if normalise == "each+mean" else expected
        torch.testing.assert_close(model.class_text([name])[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["texts.json", "JSON"]),
        ('{"a": ["x"],\n "b": [}', ["texts.json, line 2"]),
        ('{"a": ["x"], "a": ["y"]}', ["'a'", "twice"]),
        ([["a", "b"]], ["expected classes"]),
        ({}, ["expected classes"]),
        ({"a": []}, ["'a'"]),
        ({"a": ["x", "..."]}, ["'a'", "word"]),
        ({"a": [3], "b": {"c": "d"}}, ["'a'", "'b'"]),
        ({"ride bike": "x", "ride_bike": "y"}, ["'ride bike' and 'ride_bike'", "same class"]),
        ({"a": ["x"], "b": "x"}, ["'a' and 'b'", "same sentences"]),
    ],
    ids=str,
)
def test_errors_in_a_file_are_named(content, parts, tmp_path):
    with pytest.raises(UserError) as refused:
        read_sentences(file_of(tmp_path, content))
    assert all(part in str(refused.value) for part in ["MODEL.TEXT_FILE", *parts]), refused.value


def test_a_file_that_is_missing_or_has_numbers_as_classes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"MODEL\.TEXT_FILE.*nowhere\.yaml"):
        read_sentences(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="class 7 is not text"):
        read_sentences(file_of(tmp_path, "7: a person counts", "texts.yaml"))


def test_classes_without_sentences_get_a_suggestion(tmp_path):
    sentences = ClassSentences(TextOptions(TEXT_FILE=str(file_of(tmp_path, DESCRIBED))))
    with pytest.raises(UserError, match=r"no sentences for 'ride bikes' \(it has 'ride_bike'\), 'clap'"):
        sentences.of(["ride bikes", "push up", "clap"])


# --- in a run -----------------------------------------------------------------------------------------------


@pytest.fixture
def described(tiny_dataset: TinyDataset, tmp_path: Path) -> Path:
    """Returns a file with sentences for every class of the tiny data set."""
    data = Learner(tiny_config(tiny_dataset, tmp_path / "other")).data
    names = [prompt for index in data.splits.values() for prompt in index.prompts]
    return file_of(tmp_path, {name: [f"somebody does {name}", f"{name} is shown"] for name in names})


def test_a_run_resumes_with_a_moved_file_but_not_with_other_sentences(tiny_dataset, tmp_path, described):
    begun = ("SOLVER.LR_SCH=none", "TRAIN.VAL_FREQ=0", "TRAIN.TRAIN_EPISODES=2")
    trained(tiny_dataset, tmp_path / "run", *begun, f"MODEL.TEXT_FILE={described}")
    moved = file_of(tmp_path, described.read_text(), "moved.json")
    longer = (*begun, "TRAIN.TRAIN_EPISODES=4", f"MODEL.TEXT_FILE={moved}", "CHECKPOINT.RESUME_FROM_CHECKPOINT=true")
    trained(tiny_dataset, tmp_path / "run", *longer)
    assert load_checkpoint(tmp_path / "run" / LAST)["episode"] == 4
    moved.write_text(moved.read_text().replace("somebody does", "a child does"))
    with pytest.raises(UserError, match=r"the sentences in MODEL\.TEXT_FILE"):
        trained(tiny_dataset, tmp_path / "run", *longer, "TRAIN.TRAIN_EPISODES=6")


def test_an_incomplete_file_is_refused_before_anything_is_written(tiny_dataset, tmp_path, described):
    content = json.loads(described.read_text())
    gone = next(name for name in content if name.startswith("val"))
    del content[gone]
    with pytest.raises(UserError, match=f"no sentences for {gone!r}"):
        Learner(tiny_config(tiny_dataset, tmp_path / "run", f"MODEL.TEXT_FILE={file_of(tmp_path, content)}"))
    assert not (tmp_path / "run").exists()
