"""The demo set in which class names matter: what its classes, clips and captions promise."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from episodes.demo.actions import ACTIONS, GRIDS, OBJECTS, PAIRS, PROMPTS, SPLITS
from episodes.demo.captions import captioned_frame
from episodes.demo.motions import MOTIONS
from episodes.demo.render import render_clip, render_demo
from utils.errors import UserError


def test_splits_are_disjoint_and_of_the_documented_size():
    names = [name for classes in SPLITS.values() for name in classes]
    assert sorted(names) == sorted(PAIRS)
    assert {split: len(classes) for split, classes in SPLITS.items()} == {"train": 80, "val": 12, "test": 20}


def test_training_classes_contain_every_object_and_motion():
    pairs = [PAIRS[name] for name in SPLITS["train"]]
    assert {thing for thing, _ in pairs} == set(OBJECTS)
    assert {action for _, action in pairs} == set(ACTIONS)
    words = " ".join(PROMPTS[name] for name in SPLITS["train"]).split()
    assert set(words) >= {word for split in ("val", "test") for name in SPLITS[split] for word in PROMPTS[name].split()}


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_unseen_class_has_look_alikes(split: str):
    pairs = [PAIRS[name] for name in SPLITS[split]]
    things, actions = GRIDS[split]
    for thing, action in pairs:
        assert sum(other == thing for other, _ in pairs) == len(actions) >= 4
        assert sum(other == action for _, other in pairs) == len(things) >= 3


def test_every_clip_is_a_pure_function_of_class_seed_and_number():
    for name in PAIRS:
        clip = render_clip(name, 0, 0, demo_set="actions")
        assert clip.shape == (24, 72, 72, 3)
        assert clip.dtype == np.uint8
    again = render_clip(name, 0, 0, demo_set="actions")
    np.testing.assert_array_equal(clip, again)
    assert not np.array_equal(clip, render_clip(name, 1, 0, demo_set="actions"))
    assert not np.array_equal(clip, render_clip(name, 0, 1, demo_set="actions"))
    with pytest.raises(UserError, match="star_move_left"):
        render_clip("grow", 0, 0, demo_set="actions")


def test_captions_name_objects_but_no_motion():
    words: set[str] = set()
    for number in range(300):
        frame, caption = captioned_frame(0, number)
        assert frame.shape == (72, 72, 3)
        named = [word for word in caption.split() if word in OBJECTS]
        assert len(named) == len(set(named)) == 1 + caption.count(" and ")
        words |= set(caption.split())
    assert set(OBJECTS) <= words
    assert not words & {MOTIONS[action].prompt.split()[0] for action in ACTIONS}
    np.testing.assert_array_equal(frame, captioned_frame(0, 299)[0])


def test_the_set_is_rendered_with_its_prompts(tmp_path: Path):
    render_demo(tmp_path, seed=3, train_clips=1, eval_clips=1, workers=1, demo_set="actions")
    classes = yaml.safe_load((tmp_path / "splits" / "classes.yaml").read_text())
    assert classes["dataset"] == "demo_actions"
    assert {entry["folder"]: entry["prompt"] for entry in classes["test"]} == {
        name: PROMPTS[name] for name in SPLITS["test"]
    }
    assert len(list(tmp_path.glob("videos/*/*.mp4"))) == len(PAIRS)
    with pytest.raises(UserError, match="other parameters"):  # the sets do not mix
        render_demo(tmp_path, seed=3, train_clips=1, eval_clips=1, demo_set="motions")
