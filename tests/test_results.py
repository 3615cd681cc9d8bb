"""The result line and the class table show the contents of results.json in a readable order."""

import json

import numpy as np
import pytest

from episodes.splits import EXPECTS
from run.answers import Answers
from run.feature_cache import CLIP_KEYS
from run.results import _best_validation, per_class_table, result_line, write_results
from tests.helpers.tiny_runs import DEMO
from utils.config import config_to_dict, load_config
from utils.config_changes import check_resumed_config, differences_from_training
from utils.errors import UserError

RESULTS = {
    "dataset": "tiny", "split": "test", "way": 5, "shot": 1, "episodes": 10000, "seed": 6, "protocol": "inductive",
    "accuracy": 71.234, "interval_95": 0.456, "trained_with_seed": 6, "checkpoint_selected_on": "val",
    "split_notes": [], "differs_from_training": [], "differs_from_default": [], "label": "clipspm",
}  # fmt: skip


def line_of(**changes: object) -> str:
    return result_line(load_config(DEMO).config, {**RESULTS, **changes})


def test_a_plain_result_has_no_warning():
    line = line_of()
    for part in ("tiny 5-way 1-shot", "clipspm", "71.23 ± 0.46 %", "10,000 episodes", "split=test", "seed=6"):
        assert part in line
    assert "trained with" not in line
    assert not any(word.isupper() and len(word) > 4 for word in line.split())


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({"trained_with_seed": 1}, "trained with seed 1"),
        ({"trained_with_seed": 0}, "trained with seed 0"),
        ({"checkpoint_selected_on": "test"}, "SELECTED ON THE TEST SPLIT"),
        ({"split_notes": ["left out golf/thumbs", f"golf: {EXPECTS} 2", f"hug: {EXPECTS} 1"]}, "IN 2 CLASSES"),
        ({"differs_from_training": ["DATA.IMG_NORM: ..."]}, "CONFIG DIFFERS FROM TRAINING"),
    ],
)
def test_caveats_follow_the_accuracy(changes, added):
    assert added in line_of(**changes)
    assert line_of(**changes).startswith(line_of())


def test_without_a_config_the_training_seed_is_unknown():
    assert line_of(trained_with_seed=None) == line_of()


def test_the_class_table_is_sorted_by_accuracy_and_skips_unused_classes():
    rows = [("easy", 90.0, 20), ("hard", 9.5, 10), ("never_asked", None, 0), ("middle", 50.0, 30)]
    results = {"per_class": [dict(zip(("class", "accuracy", "queries"), row, strict=True)) for row in rows]}
    lines = per_class_table(results).splitlines()
    assert [line.split()[0] for line in lines] == ["hard", "middle", "easy"]
    assert [line.split()[1] for line in lines] == ["9.50", "50.00", "90.00"]
    assert "of 10 queries" in lines[0]


def test_differing_options_are_named_except_test_options():
    otam = DEMO.parents[1] / "otam" / "demo.yaml"
    changes = ["MODEL.OTAM_LAMBDA=0.3", "DATA.SEQ_LEN=4", "MODEL.SEED=9", "MODEL.TRAINABLE=head"]
    stored, now = (config_to_dict(load_config(otam, overrides).config) for overrides in ([], changes))
    named = [sentence.partition(":")[0] for sentence in differences_from_training(stored, now)]
    assert named == ["DATA.SEQ_LEN", "MODEL.OTAM_LAMBDA"]


def test_every_setting_of_a_test_clip_that_differs_from_training_is_named():
    stored = config_to_dict(load_config(DEMO).config)
    values = {key: stored["DATA"][key] for key in CLIP_KEYS}
    changed = {key: not value if isinstance(value, bool) else value + 1 for key, value in values.items()}
    lines = differences_from_training(stored, {**stored, "DATA": {**stored["DATA"], **changed}})
    assert [line.partition(":")[0] for line in lines] == sorted(f"DATA.{key}" for key in CLIP_KEYS)


def test_another_method_is_named_first_and_without_the_options_of_one_method(tmp_path):
    clipspm, otam = (
        config_to_dict(load_config(DEMO.parents[1] / name / "demo.yaml").config) for name in ("clipspm", "otam")
    )
    sentences = differences_from_training(clipspm, otam)
    assert sentences[0].startswith("MODEL.NAME: ")
    assert not any("None" in sentence for sentence in sentences)
    with pytest.raises(UserError, match=r"\(MODEL\.NAME was clipspm, is otam") as refused:
        check_resumed_config(clipspm, otam, tmp_path, episode=1, validates=True)
    assert "None" not in str(refused.value)


def test_a_second_test_run_keeps_the_first_results(tmp_path):
    nothing = np.zeros((0, 1), np.int32)
    answers = Answers(nothing, nothing, nothing, nothing, nothing, nothing, nothing, {})
    paths = [write_results(tmp_path, dict(RESULTS), answers) for _ in range(2)]
    assert [json.loads(path.read_text())["answers"] for path in paths] == ["answers.npz", "answers_2.npz"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json", "answers.npz", "results_2.json", "answers_2.npz"
    }  # fmt: skip


@pytest.mark.parametrize(("content", "accuracy"), [({"best_accuracy": 0.0}, 0.0), ({"best_accuracy": -1.0}, None)])
def test_a_validation_accuracy_of_zero_is_shown(content, accuracy):
    assert _best_validation(content) == accuracy
