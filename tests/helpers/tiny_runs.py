"""Configs of short runs on the tiny data set, the runs themselves, and the lines they log."""

import json
from pathlib import Path
from typing import Any

from run.main_run import Learner
from tests.helpers.shipped import ROOT
from tests.helpers.tiny_dataset import TinyDataset
from utils.config import load_config
from utils.schema import Config

DEMO = ROOT / "configs" / "clipspm" / "demo.yaml"


def tiny_config(data: TinyDataset, directory: Path, *overrides: str, file: Path = DEMO) -> Config:
    """Returns the demo's config on the tiny data set, a few episodes of it."""
    small = [
        f"DATA.DATA_DIR={data.videos}", f"DATA.SPLIT_DIR={data.splits}", "DATA.DATASET=tiny", "DATA.SEQ_LEN=4",
        "DATA.IMG_SIZE=32", "DATA.SHORT_SIDE=36", "DATA.NUM_WORKERS=0", "TRAIN.WAY=3", "TRAIN.QUERY_PER_CLASS=1",
        "TRAIN.TRAIN_EPISODES=6", "TRAIN.TASKS_PER_BATCH=2", "TRAIN.VAL_FREQ=4", "TRAIN.VAL_EPISODES=4",
        "TRAIN.PRINT_FREQ=2", "TEST.TEST_EPISODES=6", "DEVICE.DEVICE=cpu", f"CHECKPOINT.CHECKPOINT_DIR={directory}",
    ]  # fmt: skip
    return load_config(file, [*small, *overrides]).config


def trained(data: TinyDataset, directory: Path, *overrides: str, file: Path = DEMO) -> Learner:
    learner = Learner(tiny_config(data, directory, *overrides, file=file))
    learner.train()
    return learner


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
