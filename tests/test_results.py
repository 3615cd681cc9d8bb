"""The line to quote and the table by class say what results.json holds, in the order in which a reader wants it."""

import pytest

from episodes.splits import EXPECTS
from run.results import per_class_table, result_line
from tests.test_learner import DEMO
from utils.config import load_config

RESULTS = {
    "dataset": "tiny", "split": "test", "way": 5, "shot": 1, "episodes": 10000, "seed": 6, "protocol": "inductive",
    "accuracy": 71.234, "interval_95": 0.456, "trained_with_seed": 6, "checkpoint_selected_on": "val",
    "split_notes": [], "differs_from_training": [], "differs_from_default": [], "label": "clipspm",
}  # fmt: skip


def line_of(**changes: object) -> str:
    return result_line(load_config(DEMO).config, {**RESULTS, **changes})


def test_a_plain_result_has_no_warning_behind_it():
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
        ({"split_notes": ["left out golf/thumbs", f"golf: {EXPECTS} 2", f"hug: {EXPECTS} 1"]}, "2 CLASSES DIFFER"),
        ({"differs_from_training": ["DATA.IMG_NORM: ..."]}, "CONFIG DIFFERS FROM TRAINING"),
    ],
)
def test_what_a_reader_must_know_stands_behind_the_number(changes, added):
    assert added in line_of(**changes)
    assert line_of(**changes).startswith(line_of())


def test_a_checkpoint_without_a_config_claims_no_training_seed():
    assert line_of(trained_with_seed=None) == line_of()


def test_the_table_by_class_begins_with_the_hardest_and_leaves_out_what_was_not_asked():
    rows = [("easy", 90.0, 20), ("hard", 9.5, 10), ("never_asked", None, 0), ("middle", 50.0, 30)]
    results = {"per_class": [dict(zip(("class", "accuracy", "queries"), row, strict=True)) for row in rows]}
    lines = per_class_table(results).splitlines()
    assert [line.split()[0] for line in lines] == ["hard", "middle", "easy"]
    assert [line.split()[1] for line in lines] == ["9.50", "50.00", "90.00"]
    assert "of 10 queries" in lines[0]
