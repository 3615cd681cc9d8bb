"""The config promises: precedence, origins, typed values, old files, and files that read back the same."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.config_helpers import (
    METHODS,
    FakeOptions,
    OtherOptions,
    Spm,
    load,
    load_text,
    options_of,
    refusal,
)
from utils.config import (
    BASE_NAME,
    REPOSITORY,
    config_from_dict,
    config_to_dict,
    format_config,
    load_config,
    save_config,
)
from utils.config_messages import is_section, known_keys
from utils.config_yaml import parse_yaml
from utils.errors import UserError
from utils.schema import Config, ModelOptions

# ---------------------------------------------------------------- base.yaml


def base_text() -> str:
    return (REPOSITORY / BASE_NAME).read_text(encoding="utf-8")


def test_base_yaml_holds_every_common_key_with_the_schemas_default() -> None:
    data = parse_yaml(base_text(), BASE_NAME)
    assert data == Config().model_dump()
    assert Config.model_validate({**data, "MODEL": ModelOptions(**data["MODEL"])}) == Config()


def test_base_yaml_means_the_same_to_any_yaml_reader() -> None:
    assert yaml.safe_load(base_text()) == Config().model_dump()


def test_base_yaml_explains_every_key_in_the_schemas_words() -> None:
    expected = [
        str(field.description)
        for key, field in known_keys(Config, ModelOptions).items()
        if not is_section(key, known_keys(Config, ModelOptions))
    ]
    lines = [line for line in base_text().splitlines() if not line.startswith("#")]
    assert [line.split("  # ")[1] for line in lines if "  # " in line] == expected


def test_base_yaml_loads_as_an_experiment_file(tmp_path: Path) -> None:
    assert load(REPOSITORY / BASE_NAME).config.TRAIN == Config().TRAIN


# ---------------------------------------------------------------- precedence and origins


def test_command_line_wins_over_experiment_over_base_over_default(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, "TRAIN: {SHOT: 3, WAY: 4}\nMODEL: {HSMR: {HEADS: 2}}", "TRAIN.SHOT=5", "TRAIN.SHOT=7")
    assert (loaded.config.TRAIN.SHOT, loaded.config.TRAIN.WAY, loaded.config.SOLVER.LR) == (7, 4, 1e-5)
    assert loaded.origins["TRAIN.SHOT"] == "command line"
    assert loaded.origins["TRAIN.WAY"] == str(tmp_path / "x.yaml")
    assert loaded.origins["SOLVER.LR"] == "configs/base.yaml"
    assert loaded.origins["MODEL.HSMR.HEADS"] == str(tmp_path / "x.yaml")
    assert loaded.origins["MODEL.SPM.LAMBDA"] == "default"


def test_every_value_has_an_origin(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, "")
    known = known_keys(Config, FakeOptions)
    assert set(loaded.origins) == {key for key in known if not is_section(key, known)}


def test_a_section_with_everything_commented_out_is_empty(tmp_path: Path) -> None:
    assert load_text(tmp_path, "TRAIN:\n  # SHOT: 3\n").config == load_text(tmp_path, "# nothing\n").config


def test_the_method_on_the_command_line_decides_which_options_exist(tmp_path: Path) -> None:
    config = load_text(tmp_path, "", "MODEL.NAME=otam", "MODEL.GAMMA=1").config
    assert isinstance(config.MODEL, OtherOptions)
    assert config.MODEL.GAMMA == 1.0


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("TRAIN.SHOT=5", "TRAIN", "SHOT", 5),
        ("SOLVER.LR=1e-4", "SOLVER", "LR", 1e-4),
        ("SOLVER.BETAS=[0.9,0.999]", "SOLVER", "BETAS", [0.9, 0.999]),
        ("TEST.SHOT=null", "TEST", "SHOT", None),
        ("DATA.FLIP=true", "DATA", "FLIP", True),
        ("TEST.TEST_MODEL_PATH=", "TEST", "TEST_MODEL_PATH", ""),
        ("SOLVER={LR: 1}", "SOLVER", "LR", 1.0),
        ("TRAIN.TRAIN_EPISODES=1e5", "TRAIN", "TRAIN_EPISODES", 100000),
        ("SOLVER.LR_SCH=1000000", "SOLVER", "LR_SCH", 1000000),
        ("SOLVER.LR_SCH=[1e3, 2000]", "SOLVER", "LR_SCH", [1000, 2000]),
        ("SOLVER.LR_SCH=cosine", "SOLVER", "LR_SCH", "cosine"),
        ("SOLVER.LR_SCH=none", "SOLVER", "LR_SCH", "none"),
    ],
)
def test_command_line_values_follow_the_yaml_rules(tmp_path: Path, override, section, key, value) -> None:
    found = getattr(getattr(load_text(tmp_path, "TEST: {SHOT: 2}", override).config, section), key)
    assert found == value
    assert type(found) is type(value)


def test_a_methods_part_can_be_switched_off(tmp_path: Path) -> None:
    config = load_text(tmp_path, "", "MODEL.HSMR.ENABLED=false").config
    assert isinstance(config.MODEL, FakeOptions)
    assert not config.MODEL.HSMR.ENABLED
    assert config.MODEL.SPM.ENABLED


def test_a_loaded_config_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_text(tmp_path, "").config.TRAIN.SHOT = 3


# ---------------------------------------------------------------- published files

PUBLISHED = """
INFO: ''
DEBUG: false
USE_AMP: false
MODEL:
  NAME: 'clipspm'
  BACKBONE: 'RN50'
  SEED: 6
  METRIC: cos
  DROPOUT: 0.5
  TRANS_LINEAR_OUT_DIM: 1152
TRAIN:
  WAY: 5
  SHOT: 5
  QUERY_PER_CLASS: 4
  TRAIN_EPISODES: 20010
  VAL_FREQ: 1000
  PRINT_FREQ: 1000
  TASKS_PER_BATCH: 16
  CLASS_NAME: ['brush hair', 'cartwheel']
TEST:
  ONLY_TEST: true
  QUERY_PER_CLASS: 1
  TEST_EPISODES: 10000
  TEST_MODEL_PATH: 'checkpoints/hmdb/best.pt'
  CLASS_NAME: ['fencing', 'kick']
DATA:
  DATASET: 'hmdb'
  DATA_DIR: '/data/hmdb'
  SEQ_LEN: 8
  IMG_SIZE: 224
  NUM_WORKERS: 8
  SPLIT: 3
  IMG_NORM: true
  DEBUG_LOADER: false
CHECKPOINT:
  CHECKPOINT_DIR: 'checkpoints/hmdb'
  SAVE_FREQ: 500
  RESUME_FROM_CHECKPOINT: false
SOLVER:
  LR: 0.00001
  WEIGHT_DECAY: 5e-5
  OPTIM_METHOD: 'adam'
  LR_SCH: 1000000
  MOMENTUM: 0.9
DEVICE:
  DEVICE: 'cuda'
  NUM_GPUS: 1
  GPU_ID: 0
"""


def test_a_published_file_loads_with_one_warning_for_each_old_key(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(PUBLISHED, encoding="utf-8")
    said: list[str] = []
    loaded = load_config(path, (), said.append, options_of, lambda: METHODS)
    assert loaded.config.DATA.DATASET == "hmdb51"
    assert loaded.config.SOLVER.WEIGHT_DECAY == 5e-5
    assert loaded.config.SOLVER.LR_SCH == 1000000
    assert loaded.config.TRAIN.TRAIN_EPISODES == 20010
    assert said == loaded.warnings
    *of_keys, of_presets = said
    assert "configs/clipspm/released/" in of_presets
    assert [warning.split(": ")[1].split(" ")[0] for warning in of_keys] == [
        *("MODEL.METRIC", "MODEL.DROPOUT", "MODEL.TRANS_LINEAR_OUT_DIM", "TRAIN.CLASS_NAME", "TEST.CLASS_NAME"),
        *("DATA.DATASET", "DATA.SPLIT", "DATA.DEBUG_LOADER", "DEVICE.NUM_GPUS", "DEVICE.GPU_ID"),
    ]
    assert f"{path}: TRAIN.CLASS_NAME is no longer used: class names come from the split." in said
    assert f"{path}: DATA.DATASET hmdb is now called hmdb51." in said


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("hmdb", "hmdb51"),
        ("ucf", "ucf101"),
        ("ssv2", "ssv2_full"),
        ("ssv2_cmn", "ssv2_small"),
        ("kinetics", "kinetics"),
    ],
)
def test_published_dataset_names_are_translated(tmp_path: Path, old: str, new: str) -> None:
    loaded = load_text(tmp_path, "", f"DATA.DATASET={old}")
    dataset = loaded.config.DATA.DATASET
    assert dataset == new
    assert len(loaded.warnings) == 2 * (old != new)  # the key, and the presets


def test_warnings_go_to_the_log_by_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("DATA: {SPLIT: 100%}", encoding="utf-8")
    load_config(path, options_of=options_of)
    assert "DATA.SPLIT is no longer used" in caplog.text


# ---------------------------------------------------------------- writing


def test_the_printed_config_is_yaml_with_aligned_origins(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, "INFO: 'a # b'\nTRAIN: {SHOT: 3}", "SOLVER.BETAS=[0.9, 0.99]")
    text = format_config(loaded)
    assert parse_yaml(text, "printed") == config_to_dict(loaded.config)
    lines = [line for line in text.splitlines() if not line.endswith(":")]
    assert {line.rindex("# ") for line in lines} == {lines[0].rindex("# ")}
    assert any(line.startswith("  SHOT: 3 ") and line.endswith(f"# {tmp_path / 'x.yaml'}") for line in lines)
    assert any(line.startswith("  BETAS: [0.9, 0.99] ") and line.endswith("# command line") for line in lines)
    assert any(line.startswith("    HEADS: 8 ") and line.endswith("# default") for line in lines)


def test_a_dict_of_a_config_is_json_and_makes_an_equal_config(tmp_path: Path) -> None:
    config = load_text(tmp_path, "", "MODEL.HSMR.HEADS=4").config
    data = json.loads(json.dumps(config_to_dict(config)))
    assert data["MODEL"]["HSMR"]["HEADS"] == 4
    assert config_from_dict(data, options_of=options_of) == config


def test_a_stored_config_is_checked_like_a_file() -> None:
    data = config_to_dict(Config())
    data["TRAIN"]["SHOT"] = "five"
    with pytest.raises(UserError, match=r"TRAIN\.SHOT in last\.pt: expected a whole number, found 'five'"):
        config_from_dict(data, "last.pt", options_of)
    with pytest.raises(UserError, match=r"last\.pt: expected sections and keys, found \[1\]"):
        config_from_dict([1], "last.pt", options_of)  # type: ignore[arg-type]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER_LIKE = st.sampled_from(["1e5", "no", "null", "~", "5", "1_0", "2024-01-01", ".5", "a: b", "#x", "*a", "- a", ""])
PROBABILITY = st.floats(0, 1, exclude_max=True)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    info=TEXT | NUMBER_LIKE,
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    betas=st.lists(PROBABILITY, min_size=2, max_size=2),
    schedule=st.integers(1) | st.lists(st.integers(1), max_size=3) | st.sampled_from(["none", "cosine"]),
    flip=st.none() | st.booleans(),
    weight=st.floats(allow_nan=False, allow_infinity=False).filter(lambda value: value != 13),
)
def test_a_saved_config_loads_equal(tmp_path: Path, info, rate, betas, schedule, flip, weight) -> None:
    base = Config()
    config = Config(
        INFO=info,
        MODEL=FakeOptions(SPM=Spm(LAMBDA=weight)),
        SOLVER=base.SOLVER.model_copy(update={"LR": rate, "BETAS": betas, "LR_SCH": schedule}),
        DATA=base.DATA.model_copy(update={"FLIP": flip}),
    )
    save_config(config, tmp_path / "saved.yaml")
    loaded = load(tmp_path / "saved.yaml")
    assert loaded.config == config
    assert parse_yaml(format_config(loaded), "printed") == config_to_dict(config)


YAML_MARKS = [*"\n:-{}[],&*!|>'\"%@#?~ \t\\", ": ", "\n  ", "- ", "<<", "---", "!!int"]
YAML_PIECES = st.sampled_from([*YAML_MARKS, "TRAIN", "SHOT", "MODEL", "NAME", "HSMR", "5", "1e5"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(YAML_PIECES | st.text(max_size=3), max_size=25), override=st.text(max_size=12))
def test_no_text_raises_anything_but_a_user_error(tmp_path: Path, pieces: list[str], override: str) -> None:
    path = tmp_path / "random.yaml"
    path.write_bytes("".join(pieces).encode("utf-8", errors="surrogatepass"))
    for overrides in ((), (f"INFO={override}",), (f"{override}=1",), (f"TRAIN.{override}",)):
        told = refusal(lambda overrides=overrides: load(path, *overrides))
        assert told is None or (told and "pydantic" not in told)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(sorted(known_keys(Config, FakeOptions))),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=4,
    ),
)
def test_no_value_raises_anything_but_a_user_error(key: str, value: object) -> None:
    data: dict[str, object] = {}
    *sections, leaf = key.split(".")
    inner: dict = data
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[leaf] = value
    told = refusal(lambda: config_from_dict(data, "x.yaml", options_of))
    assert told is None or (key.split(".")[0] in told and "Input should" not in told)
