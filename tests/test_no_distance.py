"""Weights that disable every distance are refused before anything runs."""

from pathlib import Path

import pytest

from models.model_clipspm import ClipSpmOptions
from models.model_cpm2c import Cpm2cOptions
from utils.config import load_config
from utils.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"DISTANCES.PROTOTYPE": 0, "PADM.ENABLED": False}, "ENABLED is false, MODEL.DISTANCES.MODULATED 1 and"),
        ({"DISTANCES.PROTOTYPE": 0, "DISTANCES.MODULATED": 0, "DISTANCES.ANCHOR": 0}, "is true, .*MODULATED 0 and"),
    ],
    ids=str,
)
def test_clipspm_without_any_distance_is_refused(values, found):
    overrides = [f"MODEL.{key}={str(value).lower()}" for key, value in values.items()]
    with pytest.raises(UserError, match=f"MODEL.DISTANCES.PROTOTYPE is 0 .*{found} .*above 0") as refused:
        load_config(CONFIGS / "clipspm" / "demo.yaml", overrides)
    assert str(refused.value).count("MODEL.DISTANCES.PROTOTYPE is 0") == 1


def test_clipspm_accepts_any_single_distance():
    for weights in ({"PROTOTYPE": 0.0, "MODULATED": 0.0}, {"PROTOTYPE": 0.0, "ANCHOR": 0.0}):
        ClipSpmOptions(DISTANCES=weights)
    ClipSpmOptions(DISTANCES={"MODULATED": 0.0, "ANCHOR": 0.0}, PADM={"ENABLED": False})


def test_tsfsar_without_any_exponent_is_refused():
    with pytest.raises(UserError, match=r"MODEL\.FUSION\.FRAMES.* all 0.* set one of them above 0"):
        load_config(CONFIGS / "tsfsar" / "demo.yaml", ["MODEL.FUSION.FRAMES=0"])
    load_config(CONFIGS / "tsfsar" / "demo.yaml", ["MODEL.FUSION.FRAMES=0", "MODEL.FUSION.SIDE=0.1"])


def test_cpm2c_without_any_distance_is_refused():
    sentence = "MODEL.DISTANCES.APPEARANCE and MODEL.DISTANCES.MOTION are both 0, .*: set one of them above 0"
    with pytest.raises(UserError, match=sentence):
        load_config(CONFIGS / "cpm2c" / "demo.yaml", ["MODEL.DISTANCES.APPEARANCE=0", "MODEL.DISTANCES.MOTION=0"])
    for left in ("APPEARANCE", "MOTION"):
        Cpm2cOptions(DISTANCES={"APPEARANCE": 0.0, "MOTION": 0.0, left: 0.1})
