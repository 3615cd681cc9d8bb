"""Every shipped config loads, names a known data set, and has a header with its description and command."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import models
from run.data import shipped_split_directory, split_directory
from run.solver import rate_factor
from tests.helpers.shipped import CONFIGS, ROOT, SHIPPED
from utils.config import config_to_dict, load_config
from utils.schema import DATASETS, Config

TABLE = yaml.safe_load((ROOT / "tests" / "fixtures" / "configs.yaml").read_text(encoding="utf-8"))
NAMES_AND_FOLDERS = ("MODEL.NAME", "DATA.DATASET", "DATA.DATA_DIR", "DATA.SPLIT_DIR", "CHECKPOINT.CHECKPOINT_DIR")


def flat(content: Any, key: str = "") -> dict[str, Any]:
    """Flattens nested sections: {"TRAIN": {"SHOT": 5}} -> {"TRAIN.SHOT": 5}."""
    if not isinstance(content, dict):
        return {key: content}
    return {k: v for name, part in content.items() for k, v in flat(part, f"{key}.{name}".lstrip(".")).items()}


def defaults_of(method: str) -> dict[str, Any]:
    """Returns every key of a config of this method with its default."""
    return flat({**config_to_dict(Config()), "MODEL": models.options_of(method)().model_dump(mode="json")})


@pytest.mark.parametrize("method", TABLE["options"])
def test_option_defaults_match_the_table(method: str):
    common = flat(config_to_dict(Config()))
    own = {key: value for key, value in defaults_of(method).items() if key not in common or common[key] != value}
    own.pop("MODEL.NAME", None)
    assert own == {f"MODEL.{key}": value for key, value in TABLE["options"][method].items()}


def test_every_method_and_config_is_in_the_table():
    assert set(SHIPPED) == set(TABLE["options"])
    assert {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in CONFIGS} == set(TABLE["configs"])


@pytest.mark.parametrize("name", TABLE["configs"])
def test_configs_match_the_table(name: str):
    config = load_config(ROOT / "configs" / f"{name}.yaml").config
    defaults = defaults_of(config.MODEL.NAME)
    resolved = {key: value for key, value in flat(config_to_dict(config)).items() if value != defaults[key]}
    assert {key: value for key, value in resolved.items() if key not in NAMES_AND_FOLDERS} == TABLE["configs"][name]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_loads_without_warning_and_has_a_command_in_its_header(path: Path):
    loaded = load_config(path)
    assert loaded.warnings == []
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert len(header) >= 2
    assert any(str(path.relative_to(ROOT)) in line or "train_test.sh" in line for line in header)
    assert split_directory(loaded.config)
    if path.stem in DATASETS:
        assert path.stem == loaded.config.DATA.DATASET
        assert (shipped_split_directory(loaded.config) / "classes.yaml").is_file()


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem in DATASETS], ids=str)
def test_benchmark_configs_read_the_default_output_of_prepare(path: Path):
    data = load_config(path).config.DATA
    assert f"data/{path.stem}/packed" == data.DATA_DIR
    listed = path.stem not in ("hmdb51", "ucf101")
    assert (f"data/{path.stem}/splits" if listed else "") == data.SPLIT_DIR


@pytest.mark.parametrize("method", SHIPPED)
def test_each_method_has_a_config_for_the_demo_and_for_all_five_benchmarks(method: str):
    stems = {path.stem for path in CONFIGS if path.parent == ROOT / "configs" / method}
    assert stems - {"demo_actions"} == {"demo", *DATASETS}
    for path in CONFIGS:
        if path.parent == ROOT / "configs" / method:
            assert method == load_config(path).config.MODEL.NAME


def test_every_config_has_a_unique_run_directory():
    directories = [load_config(path).config.CHECKPOINT.CHECKPOINT_DIR for path in CONFIGS]
    assert len(set(directories)) == len(directories)


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_released_preset_matches_the_published_code(dataset: str):
    config = load_config(ROOT / "configs" / "clipspm" / "released" / f"{dataset}.yaml").config
    model = config.MODEL.model_dump()
    assert config.TRAIN.VAL_SPLIT == "test"
    assert config.TRAIN.PROTOCOL == config.TEST.PROTOCOL == "transductive"
    assert not config.DATA.IMG_NORM
    assert not model["FREEZE_BN"]
    assert model["HSMR"]["LEARNABLE_WEIGHT"]
    assert not model["SPM"]["TEXT_LOSS"]
    assert not model["SPM"]["CONSISTENCY_LOSS"]
    # The released loss: 1/16 of a sum over the queries, plus 0.001 of the auxiliary terms; here the loop divides both.
    queries = config.TRAIN.WAY * config.TRAIN.QUERY_PER_CLASS
    assert model["CROSS_ENTROPY_WEIGHT"] == queries
    assert model["AUXILIARY_WEIGHT"] == pytest.approx(0.001 * config.TRAIN.TASKS_PER_BATCH)


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_clean_preset_keeps_the_test_classes_out_of_training(dataset: str):
    config = load_config(ROOT / "configs" / "clipspm" / f"{dataset}.yaml").config
    assert config.TRAIN.VAL_SPLIT == "val"
    assert config.TEST.main_protocol == "inductive"
    assert config.DATA.IMG_NORM


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda path: path.name)
def test_a_users_own_methods_and_configs_are_not_enumerated(path: Path):
    """They would fail the suite for files outside this repository; `tests/helpers/shipped.py` lists what is tested."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(params=|parametrize\(.*|for \w+ in )models\.available\(\)(\)| if)", text)
    assert not re.search(r"glob\(\"[^\"]*\*\.yaml\"\)", text)


def test_test_files_share_code_through_the_helpers_alone():
    """A test file that imports another runs its skips and fixtures, and moves with it."""
    imports = re.compile(r"^\s*(from|import) (tests\.)?(test_\w+|conftest)\b|^\s*from tests import test_", re.MULTILINE)
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert [path.name for path in files if imports.search(path.read_text(encoding="utf-8"))] == []


# Episodes of an epoch, factor at the start of the warm-up of one epoch, milestones in epochs, and their factors.
RELEASED_SCHEDULES = {
    "clipfsar/hmdb51": (700, 0.1, (4, 6), (0.1, 0.01)),
    "clipfsar/kinetics": (250, 0.5, (6, 9), (0.1, 0.01)),
    "clipfsar/ssv2_full": (4000, 0.2, (4, 6), (0.1, 0.01)),
    "clipfsar/ssv2_small": (2000, 0.4, (4, 6), (0.1, 0.01)),
    "clipfsar/ucf101": (600, 0.05, (4, 6), (0.1, 0.01)),
    "empnet/hmdb51": (2000, 0.01, (4, 6), (0.1, 0.01)),
    "hyrsm/hmdb51": (300, 0.2, (2, 3, 7), (0.5, 0.1, 0.01)),
    "hyrsm/kinetics": (100, 5 / 22, (4, 6, 9), (0.5, 0.1, 0.05)),
    "hyrsm/ssv2_full": (3000, 0.2, (6, 9), (0.1, 0.01)),
    "hyrsm/ssv2_small": (1500, 0.2, (4, 8), (0.1, 0.01)),
    "hyrsm/ucf101": (700, 0.2, (3, 5, 7), (0.5, 0.1, 0.01)),
    "molo/hmdb51": (500, 0.2, (3, 5, 7), (0.5, 0.1, 0.01)),
    "molo/kinetics": (350, 0.25, (4, 6), (0.1, 0.01)),
    "molo/ssv2_full": (6000, 0.2, (6, 9), (0.1, 0.01)),
    "molo/ssv2_small": (1500, 0.2, (4, 8), (0.1, 0.01)),
    "molo/ucf101": (2000, 0.2, (3, 6), (0.1, 0.01)),
}


@pytest.mark.parametrize("name", RELEASED_SCHEDULES)
def test_learning_rates_follow_the_released_schedule(name: str):
    """The released solver adds the number of whole epochs to the fractional epoch, so it counts each epoch twice."""
    length, start, milestones, factors = RELEASED_SCHEDULES[name]
    config = load_config(ROOT / "configs" / f"{name}.yaml").config
    total = config.TRAIN.TRAIN_EPISODES
    for episode in range(0, total, length // 10):
        epoch = episode // length + episode / length
        step = (1.0, *factors)[sum(epoch >= milestone for milestone in milestones)]
        expected = start + (1 - start) * epoch if epoch < 1 else step
        assert rate_factor(config.SOLVER, episode + 1, total) == pytest.approx(expected, abs=0.01)
