"""The methods and configs of this repository; a user's own are not tested with them.

To test a method of your own like the others: `METHOD=mine python -m pytest tests/test_methods.py`.
"""

import os
from pathlib import Path
from typing import Any

from utils.schema import DATASETS, DEMO_DATASETS

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (
    "a2m2",
    "clipfsar",
    "clipmei",
    "clipspm",
    "cpm2c",
    "d2st",
    "empnet",
    "hyrsm",
    "molo",
    "otam",
    "strm",
    "team",
    "trx",
    "tsfsar",
    "zeroshot",
)
ON_VIT = ("d2st", "empnet", "tsfsar")  # methods that need a vision transformer
METHODS = (*SHIPPED, *os.environ.get("METHOD", "").split())
CONFIGS = sorted(
    path
    for folder in (*SHIPPED, "clipspm/released")
    for name in (*DEMO_DATASETS, *DATASETS)
    if (path := ROOT / "configs" / folder / f"{name}.yaml").is_file()
)
SWEEPS = tuple(
    ROOT / "configs/sweeps" / f"{name}.yaml"
    for name in (
        "a2m2_parts",
        "all_methods",
        "clipspm_ablation",
        "clipspm_losses",
        "demo_a2m2_parts",
        "demo_actions",
        "demo_all_methods",
        "demo_clipspm_ablation",
        "demo_clipspm_losses",
        "demo_matchers_shots",
        "demo_search",
        "fair",
        "matchers_backbones",
        "shots",
    )
)


def tiny_backbone(method: str) -> str:
    """Returns the tiny MODEL.BACKBONE that a method supports."""
    return "tiny-vit" if method in ON_VIT else "tiny"


def tiny_options(method: str) -> dict[str, Any]:
    """Returns the keys of MODEL that build a method on its tiny backbone from random weights."""
    parts = {"SIDE": {"WIDTH": 32, "HEAD_DIM": 16}} if method == "tsfsar" else {}  # no wider than the backbone
    return {"BACKBONE": tiny_backbone(method), "CLIP_WEIGHTS": "random", **parts}
