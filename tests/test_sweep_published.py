"""Published numbers in tables of sweeps: from the headers of configs, for the same task and method only."""

import re
from pathlib import Path

import pytest

from run.sweeping.published import lines_of, published
from tests.helpers.shipped import CONFIGS
from utils.config import load_config


@pytest.mark.parametrize(
    ("name", "overrides", "number"),
    [
        ("clipspm/hmdb51", ["TRAIN.SHOT=1"], 77.4),
        ("clipspm/hmdb51", ["TRAIN.SHOT=3", "MODEL.BACKBONE=ViT-B/16"], 86.3),
        ("clipspm/hmdb51", ["TRAIN.SHOT=2"], None),
        ("clipspm/hmdb51", ["TRAIN.WAY=4"], None),
        ("clipspm/hmdb51", ["TRAIN.SHOT=1", "DATA.DATASET=kitchen", "DATA.SPLIT_DIR=data/kitchen/splits"], None),
        ("clipspm/hmdb51", ["MODEL.SPM.ENABLED=false"], None),  # an ablation is another method
        ("clipfsar/hmdb51", ["MODEL.BACKBONE=ViT-B/16", "MODEL.COMBINE=true"], 77.1),
        ("clipfsar/kinetics", ["MODEL.BACKBONE=ViT-B/16", "MODEL.COMBINE=true", "TEST.SHOT=5"], None),
        ("clipfsar/hmdb51", ["TEST.SHOT=5", "MODEL.MERGE_BEFORE=true"], 80.7),
        ("otam/kinetics", ["TRAIN.SHOT=5"], 85.8),
        ("otam/kinetics", ["TRAIN.SHOT=5", "MODEL.MATCHER=mean"], None),
        ("hyrsm/hmdb51", ["MODEL.POSITIONS.DIVISOR=50", "MODEL.COHERENCE.WEIGHT=0.2", "MODEL.COHERENCE.BETA=20"], 76.4),
        ("hyrsm/hmdb51", [], 76.0),
        ("zeroshot/hmdb51", ["MODEL.BACKBONE=ViT-B/16", "TRAIN.SHOT=5"], 75.9),
        ("a2m2/ssv2_full", ["TRAIN.SHOT=5"], 74.1),
    ],
)  # fmt: skip
def test_published_numbers_are_of_the_same_task_and_method(name, overrides, number):
    path = Path(f"configs/{name}.yaml")
    found = published(path, load_config(path, overrides).config)
    assert (found and found.accuracy) == number


def test_every_published_number_in_a_header_is_found():
    """A line in another form would be silently omitted from tables."""
    for path in CONFIGS:
        header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#   ")]
        tables = [line for line in header if re.search(r"(^|\s)\d\d\.\d( /|\s|$)", line)]
        assert len(lines_of(path)) == len(tables), f"{path}: {tables}"
