"""Configs of the released CLIP-SPM code load, with a warning for each key that changed."""

from pathlib import Path

import pytest

from tests.helpers.configs import load_text
from utils.config import load_config
from utils.experiment_file import LEGACY_VALUES

RELEASED = """
MODEL: {NAME: 'clipspm', BACKBONE: 'RN50', SEED: 6, METRIC: cos, DROPOUT: 0.5, TRANS_LINEAR_OUT_DIM: 1152}
TRAIN: {SHOT: 5, TRAIN_EPISODES: 20010, CLASS_NAME: ['brush hair', 'cartwheel']}
TEST: {ONLY_TEST: true, TEST_MODEL_PATH: 'checkpoints/hmdb/best.pt', CLASS_NAME: ['fencing', 'kick']}
DATA: {DATASET: 'hmdb', DATA_DIR: '/data/hmdb', SPLIT: 100%, IMG_NORM: true, DEBUG_LOADER: false}
SOLVER: {LR: 0.00001, WEIGHT_DECAY: 5e-5, OPTIM_METHOD: 'adam', LR_SCH: 1000000}
DEVICE: {DEVICE: 'cuda', NUM_GPUS: 1, GPU_ID: 0}
"""


def test_a_released_file_loads_with_one_warning_for_each_old_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(RELEASED, encoding="utf-8")
    loaded = load_config(path)
    solver = loaded.config.SOLVER
    assert (loaded.config.DATA.DATASET, solver.WEIGHT_DECAY, solver.LR_SCH) == ("hmdb51", 5e-5, 1000000)
    assert caplog.messages == loaded.warnings
    *of_keys, of_presets = loaded.warnings
    assert "configs/clipspm/released/" in of_presets
    assert all(warning.startswith(f"{path}: ") for warning in of_keys)
    assert [warning.split(": ")[1].split(" ")[0] for warning in of_keys] == [
        *("MODEL.METRIC", "MODEL.DROPOUT", "MODEL.TRANS_LINEAR_OUT_DIM", "TRAIN.CLASS_NAME", "TEST.CLASS_NAME"),
        *("DATA.DATASET", "DATA.SPLIT", "DATA.DEBUG_LOADER", "DEVICE.NUM_GPUS", "DEVICE.GPU_ID"),
    ]


def test_released_dataset_names_are_translated(tmp_path: Path) -> None:
    for old, new in LEGACY_VALUES["DATA.DATASET"].items():
        loaded = load_text(tmp_path, "", f"DATA.DATASET={old}")
        assert new == loaded.config.DATA.DATASET
        assert old in loaded.warnings[0]
    assert load_text(tmp_path, "", "DATA.DATASET=kinetics").warnings == []
