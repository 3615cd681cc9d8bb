"""The config of a data set of one's own, whose episodes fit its classes and videos."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from episodes.preparation.settings import PACKED, SPLIT_LISTS
from episodes.search import SPLITS
from episodes.splits import SplitIndex
from utils.yaml_text import one_line

CONFIG = "config.yaml"
USUAL_WAY, USUAL_QUERIES = 5, 4
SMALLEST_WAY = 2  # classes of one split in an episode


def config_file(indexes: Mapping[str, SplitIndex], dataset: str, out: Path) -> str:
    """Returns the text of a config that trains and tests CLIP-SPM, 1-shot.

    Args:
        indexes: split -> its videos, of train, val and test.
        dataset: its name.
        out: its folder.
    """
    classes = {split: len(indexes[split].classes) for split in SPLITS}
    way = {split: max(SMALLEST_WAY, min(USUAL_WAY, number)) for split, number in classes.items()}
    fewest = min(map(len, indexes["train"].videos_of_class), default=0)
    queries = max(1, min(USUAL_QUERIES, fewest - 1))
    run_name = re.sub(r"[^\w.-]+", "_", dataset).strip(".") or "own"
    lines = {
        "WAY": (way["train"], f"train has {classes['train']} classes"),
        "VAL_WAY": (min(way["val"], way["test"]), f"val has {classes['val']} classes"),
        "QUERY_PER_CLASS": (queries, f"the smallest class of train has {fewest} videos, and 1 of them is the support"),
    }
    train = "".join(f"  {f'{key}: {value}':<34} # {why}\n" for key, (value, why) in lines.items())
    return f"""\
# CLIP-SPM on your own data ({classes["train"]} / {classes["val"]} / {classes["test"]} classes).
# Written once by `python run/prepare.py custom` and yours to edit; keys that are not here have the values of
# configs/base.yaml. {SPLIT_LISTS}/classes.yaml has the prompts.
MODEL:
  NAME: clipspm
  BACKBONE: RN50                     # or ViT-B/16

TRAIN:
{train}  SHOT: 1
  TRAIN_EPISODES: 20000
  TASKS_PER_BATCH: 16

TEST:
  {f"WAY: {way['test']}":<34} # test has {classes["test"]} classes
  SHOT: 1                            # or 5, where each class of test has 6 videos
  TEST_EPISODES: 10000

DATA:
  DATASET: {one_line(dataset)}
  DATA_DIR: {one_line((out / PACKED).as_posix())}
  SPLIT_DIR: {one_line((out / SPLIT_LISTS).as_posix())}

SOLVER:
  LR: 1e-5
  WEIGHT_DECAY: 5e-5

CHECKPOINT:
  CHECKPOINT_DIR: {one_line(f"checkpoints/clipspm_{run_name}")}
"""
