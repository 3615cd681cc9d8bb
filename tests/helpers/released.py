"""Checkpoints with the names of the released code, of tiny models."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import models
from models.released import (
    OUR_BACKBONE,
    ReleasedNames,
)
from run.main_run import Learner
from tests.helpers.tiny_runs import DEMO, tiny_config
from utils.checkpoint import STATE
from utils.config import load_config

MAX_BLOCKS = 3  # of the tiny towers, with `*` in place of numbers


def released_state(state: Mapping[str, Tensor], names: ReleasedNames) -> dict[str, Tensor]:
    """Returns the entries of a method's model under their released names; divided ones are joined."""
    back = {}
    for released, ours in {**names.used, **names.backbone}.items():
        for prefix in [ours] if isinstance(ours, str) else ours:
            for number in map(str, range(MAX_BLOCKS)) if "*" in prefix else [""]:
                back[prefix.rstrip(".").replace("*", number)] = released.rstrip(".").replace("*", number)
    parts: dict[str, list[Tensor]] = {}
    for name, value in state.items():
        prefix = next(prefix for prefix in back if name == prefix or name.startswith(prefix + "."))
        parts.setdefault(back[prefix] + name.removeprefix(prefix), []).append(value)
    return {name: torch.cat(values) if len(values) > 1 else values[0] for name, values in parts.items()}


RESNET = ["MODEL.BACKBONE=resnet18", "MODEL.WEIGHTS=random"]
OPTIONS: dict[str, list[str]] = {
    "clipmei": ["MODEL.MIC.LEARNABLE_WEIGHT=true"],
    "clipspm": ["MODEL.HSMR.LEARNABLE_WEIGHT=true"],
    "d2st": ["MODEL.CLASS_WEIGHT=0"],  # its classifier is not read from a checkpoint
    "empnet": ["MODEL.CLIP_WEIGHTS=random"],  # the demo's weights are for larger frames
    "hyrsm": [*RESNET, "MODEL.CLASS_WEIGHT=0"],  # its classifier is not read from a checkpoint
    # The released code trains with the reconstruction loss, whose weight is 0 by default here.
    "molo": [*RESNET, "MODEL.CLASS_WEIGHT=0", "MODEL.RECONSTRUCTION_WEIGHT=0.2"],
    # Its classifier is not read from a checkpoint, whose shapes do not show the width of a head, released as 64.
    "tsfsar": ["MODEL.LOSSES.CLASS=0", "MODEL.SIDE.WIDTH=64", "MODEL.SIDE.HEAD_DIM=64"],
    "strm": [*RESNET, "MODEL.PROXIMITY_WEIGHT=0"],  # its projection is not in any checkpoint
}


def config_of(method: str) -> Path:
    return DEMO.parent.parent / method / "demo.yaml"


def learner_of(method: str, tiny_dataset: Any, directory: Path, *overrides: str) -> Learner:
    base = tiny_config(tiny_dataset, directory)
    small = [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in base.model_dump().items()
        if section not in ("MODEL", "INFO", "DEBUG", "USE_AMP")
        for key, value in values.items()
    ]
    of_clip = OUR_BACKBONE in models.method_class(method).released.backbone.values()
    options = OPTIONS.get(method, [] if of_clip else RESNET)
    return Learner(load_config(config_of(method), [*small, *options, *overrides]).config)


def released_content(learner: Learner, method: str) -> dict[str, Any]:
    """Returns the content that the released code would have saved for these weights."""
    names = models.method_class(method).released
    state = released_state(learner.model.state_dict(), names)
    state |= {f"{prefix}.weight": torch.zeros(2) for prefix in names.unused}
    return {
        "iteration": 20010,
        STATE: state,
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-5}]},
        "scheduler": {"milestones": [1000000]},
        "acc": np.float64(77.4),
    }
