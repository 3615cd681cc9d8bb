"""The config of a custom data set, with episodes that fit its classes and videos."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from episodes.preparation.settings import PACKED, SPLIT_LISTS
from episodes.search import SPLITS
from episodes.splits import SplitIndex
from utils.errors import counted
from utils.yaml_text import one_line

CONFIG = "config.yaml"
USUAL_WAY, USUAL_QUERIES = 5, 4
MIN_WAY = 2  # classes of one split in an episode


def config_file(indexes: Mapping[str, SplitIndex], dataset: str, out: Path) -> str:
    """Returns the text of a 1-shot config for CLIP-SPM or, without train classes, for tests of OTAM.

    OTAM compares CLIP's features directly, whereas parts of CLIP-SPM are random before training.

    Args:
        indexes: split -> its videos, of the splits that have classes.
        dataset: name of the data set.
        out: its folder.
    """
    classes = {split: len(indexes[split].classes) if split in indexes else 0 for split in SPLITS}
    way = {split: max(MIN_WAY, min(USUAL_WAY, number)) for split, number in classes.items()}
    run_name = re.sub(r"[^\w.-]+", "_", dataset).strip(".") or "own"
    method, title = ("clipspm", "CLIP-SPM") if classes["train"] else ("otam", "OTAM without training")
    return f"""\
# {title} on your own data ({classes["train"]} / {classes["val"]} / {classes["test"]} classes).
# Written once by `python run/prepare.py custom` and yours to edit; keys that are missing have the values of
# configs/base.yaml. {SPLIT_LISTS}/classes.yaml has the prompts.
MODEL:
  NAME: {method}
  BACKBONE: RN50                     # or ViT-B/16

TRAIN:
{_training(indexes, classes, way)}
TEST:
  {f"WAY: {way['test']}":<34} # test has {classes["test"]} classes
{_test_shot(classes)}  TEST_EPISODES: 10000

DATA:
  DATASET: {one_line(dataset)}
  DATA_DIR: {one_line((out / PACKED).as_posix())}
  SPLIT_DIR: {one_line((out / SPLIT_LISTS).as_posix())}

SOLVER:
  LR: 1e-5
  WEIGHT_DECAY: 5e-5

CHECKPOINT:
  CHECKPOINT_DIR: {one_line(f"checkpoints/{method}_{run_name}")}
"""


def _test_shot(classes: Mapping[str, int]) -> str:
    """Returns the line of TEST.SHOT, empty if the data set has train classes: TRAIN.SHOT is then for tests too."""
    if classes["train"]:
        return ""
    return "  SHOT: 1                            # or 5, if each class of test has 6 videos\n"


def _training(indexes: Mapping[str, SplitIndex], classes: Mapping[str, int], way: Mapping[str, int]) -> str:
    """Returns the keys of TRAIN that fit the classes and videos, with the reasons as comments."""
    if not classes["train"]:
        lines = {
            "TRAIN_EPISODES: 0": "train has no classes; a checkpoint: TEST.ONLY_TEST=true TEST.TEST_MODEL_PATH=FILE"
        }
    else:
        fewest = min(map(len, indexes["train"].videos_of_class), default=0)
        queries = max(1, min(USUAL_QUERIES, fewest - 1))
        val_way = f"VAL_WAY: {min(way['val'], way['test'])}" if classes["val"] else "VAL_FREQ: 0"
        lines = {
            f"WAY: {way['train']}": f"train has {classes['train']} classes",
            val_way: f"val has {classes['val'] or 'no'} classes",
            f"QUERY_PER_CLASS: {queries}": (
                f"the smallest class of train has {counted(fewest, 'video')}, and 1 of them is the support"
            ),
            "SHOT: 1": f"in tests too; 5 needs {5 + queries} videos in each class of train, 6 in the others",
            "TRAIN_EPISODES: 20000": "",
            "TASKS_PER_BATCH: 16": "",
        }
    return "".join(f"  {key:<34} # {why}\n" if why else f"  {key}\n" for key, why in lines.items())
