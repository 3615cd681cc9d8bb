"""The config promises: precedence, origins, typed values, and all problems with key and place."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.model_clipspm import ClipSpmOptions, SpmOptions
from models.model_otam import OtamOptions
from run.data import split_directory
from tests.helpers.configs import REQUIRED, load_text, problem_of, refusal
from utils.config import (
    REPOSITORY,
    config_from_dict,
    config_to_dict,
    format_config,
    load_config,
    overview,
    save_config,
)
from utils.errors import UserError
from utils.schema import DATASETS, Config, is_section, known_keys
from utils.yaml_text import parse_yaml

KNOWN = known_keys(Config, ClipSpmOptions)
VALUES = {key for key, field in KNOWN.items() if not is_section(field)}

# ---------------------------------------------------------------- base.yaml


def test_base_yaml_matches_the_schema() -> None:
    text = (REPOSITORY / "configs" / "base.yaml").read_text(encoding="utf-8")
    assert text == overview(), "write it again, as its header describes"
    assert yaml.safe_load(text) == parse_yaml(text, "base.yaml") == config_to_dict(Config())
    assert all(f"# {field.description}\n" in text for field in known_keys(Config, type(Config().MODEL)).values()
               if not is_section(field))  # fmt: skip


# ---------------------------------------------------------------- precedence and origins


def test_the_command_line_overrides_the_file_and_the_file_overrides_defaults(tmp_path: Path) -> None:
    text = "TRAIN: {SHOT: 3, WAY: 4}\nMODEL: {SPM: {ALPHA: 2}}"
    loaded = load_text(tmp_path, text, "TRAIN.SHOT=5", "TRAIN.SHOT=7", "MODEL.HSMR.ENABLED=false", "TRAIN={VAL_WAY: 3}")
    train = loaded.config.TRAIN
    assert (train.SHOT, train.WAY, train.VAL_WAY, loaded.config.SOLVER.LR) == (7, 4, 3, 1e-5)
    assert isinstance(loaded.config.MODEL, ClipSpmOptions)
    assert (loaded.config.MODEL.SPM.ALPHA, loaded.config.MODEL.HSMR.ENABLED) == (2.0, False)
    file = str(tmp_path / "x.yaml")
    changed = {"TRAIN.SHOT": "command line", "TRAIN.WAY": file, "TRAIN.VAL_WAY": "command line",
               "MODEL.SPM.ALPHA": file, "MODEL.HSMR.ENABLED": "command line"}  # fmt: skip
    assert loaded.origins == dict.fromkeys(VALUES, "default") | changed


def test_a_fully_commented_section_is_empty(tmp_path: Path) -> None:
    assert load_text(tmp_path, "TRAIN:\n  # SHOT: 3\n").config == load_text(tmp_path, "# nothing\n").config


def test_the_method_on_the_command_line_determines_the_options(tmp_path: Path) -> None:
    config = load_text(tmp_path, "", "MODEL.NAME=otam", "MODEL.OTAM_LAMBDA=1").config
    assert isinstance(config.MODEL, OtamOptions)
    assert config.MODEL.OTAM_LAMBDA == 1.0
    assert config.MODEL.BACKBONE == OtamOptions().BACKBONE != Config().MODEL.BACKBONE  # the method's default


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("TRAIN.SHOT=5", 5),
        ("SOLVER.LR=1e-4", 1e-4),
        ("SOLVER.BETAS=[0.9,0.999]", [0.9, 0.999]),
        ("TEST.SHOT=null", None),
        ("DATA.FLIP=true", True),
        ("TEST.TEST_MODEL_PATH=", ""),
        ("TRAIN.TRAIN_EPISODES=1e5", 100000),
        ("SOLVER.LR_SCH=[1e3, 2000]", [1000, 2000]),
        ("SOLVER.LR_SCH=cosine", "cosine"),
        ("INFO=no", "no"),
    ],
)
def test_command_line_values_follow_the_yaml_rules(tmp_path: Path, override: str, value: Any) -> None:
    section, _, name = override.partition("=")[0].rpartition(".")
    config = load_text(tmp_path, "TEST: {SHOT: 2}", override).config
    found = getattr(getattr(config, section) if section else config, name)
    assert (found, type(found)) == (value, type(value))


def test_a_loaded_config_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_text(tmp_path, "").config.TRAIN.SHOT = 3


def test_keys_in_braces_are_substituted_in_the_run_directory(tmp_path: Path) -> None:
    text = "CHECKPOINT: {CHECKPOINT_DIR: 'runs/{MODEL.BACKBONE}_{TRAIN.SHOT}'}"
    assert load_text(tmp_path, text, "MODEL.BACKBONE=ViT-B/16").config.CHECKPOINT.CHECKPOINT_DIR == "runs/ViT-B-16_1"
    problem = problem_of(tmp_path, text, "CHECKPOINT.CHECKPOINT_DIR=runs/{TRAIN.SHOTS}")
    assert "CHECKPOINT.CHECKPOINT_DIR on the command line" in problem
    assert "TRAIN.SHOT?" in problem


# ---------------------------------------------------------------- problems


@pytest.mark.parametrize(
    ("text", "unknown", "meant"),
    [
        ("DEUG: true", "DEUG", "DEBUG?"),
        ("TRIAN: {SHOT: 1}", "TRIAN", "TRAIN?"),
        ("TRAIN: {SHOTS: 1}", "TRAIN.SHOTS", "TRAIN.SHOT?"),
        ("train: {SHOT: 1}", "train", "TRAIN?"),
        ("TRAIN: {LR: 1}", "TRAIN.LR", "SOLVER.LR?"),
        ("SHOT: 1", "SHOT", "TRAIN.SHOT or TEST.SHOT?"),
        ("MODEL: {HMSR: {ENABLED: true}}", "MODEL.HMSR", "MODEL.HSMR?"),
        ("MODEL: {HSMR: {WEIGTH: 1}}", "MODEL.HSMR.WEIGTH", "MODEL.HSMR.WEIGHT?"),
        ("MODEL: {PADM: {qq: 1}}", "MODEL.PADM.qq", "MODEL.PADM has ENABLED."),
        ("MODEL: {SHOT_POOL: features}", "MODEL.SHOT_POOL", "MODEL.NAME; it is an option of hyrsm or otam."),
        ("MODEL: {NAME: otam, HSMR: {WEIGHT: 2}}", "MODEL.HSMR", "MODEL.NAME; it is an option of clipspm."),
        ("5: 1", "5", ", ".join(Config.model_fields)),
        ("'': 1", "''", ", ".join(Config.model_fields)),
    ],
)
def test_an_unknown_key_gets_a_suggestion(tmp_path: Path, text: str, unknown: str, meant: str) -> None:
    found = problem_of(tmp_path, text)
    assert found.startswith(f"x.yaml: unknown key {unknown}")
    assert meant in found


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("TRIAN.SHOT", "TRAIN.SHOT?"),
        ("TRAIN.SHOT.X", "TRAIN.SHOT?"),
        ("MODEL.HMSR.ENABLED", "MODEL.HSMR.ENABLED?"),
    ],
)
def test_an_unknown_key_on_the_command_line_is_named_in_full(tmp_path: Path, override: str, meant: str) -> None:
    found = problem_of(tmp_path, "", f"{override}=5")
    assert found.startswith(f"command line: unknown key {override}")
    assert found.endswith(meant)


@pytest.mark.parametrize("argument", ["TRAIN.SHOT", "=5", "", " =5"])
def test_an_override_needs_a_key_and_an_equals_sign(tmp_path: Path, argument: str) -> None:
    found = problem_of(tmp_path, "", argument)
    assert found.startswith("command line: ")
    assert "KEY=VALUE" in found
    assert repr(argument) in found


@pytest.mark.parametrize(
    ("text", "expected", "found"),
    [
        ("TRAIN.SHOT: five", "a whole number", "'five'"),
        ("TRAIN.SHOT: '8'", "a whole number", "'8'"),
        ("TRAIN.SHOT: true", "a whole number", "true"),
        ("TRAIN.SHOT: 1.5", "a whole number", "1.5"),
        ("TRAIN.SHOT: null", "a whole number", "null"),
        ("TRAIN.SHOT: {A: 1}", "a whole number", "a section with the keys A"),
        ("TRAIN.SHOT: 0", "at least 1", "0"),
        ("TEST.SHOT: x", "a whole number or null", "'x'"),
        ("MODEL.SEED: 1e10", "at most 4294967295", "10000000000.0"),
        ("DATA.FLIP: 1", "true or false or null", "1"),
        ("SOLVER.LR: true", "a number", "true"),
        ("SOLVER.LR: 0", "more than 0", "0"),
        ("SOLVER.LR: .nan", "a finite number", "nan"),
        ("SOLVER.MOMENTUM: 1", "less than 1", "1"),
        ("SOLVER.BETAS: [0.9]", "at least 2 entries", "[0.9]"),
        ("SOLVER.BETAS: [0, x]", "a list of numbers", "[0, 'x']"),
        ("SOLVER.BETAS: [0, 1]", "less than 1", "[0, 1]"),
        ("SOLVER.LR_SCH: step", "a whole number, a list of whole numbers or one of none, cosine", "'step'"),
        ("SOLVER.LR_SCH: 0", "at least 1", "0"),
        ("SOLVER.OPTIM_METHOD: lion", "one of adam, adamw, sgd", "'lion'"),
        ("MODEL.NAME: ''", "non-empty text", "''"),
        ("MODEL.NAME: [a]", "text", "['a'] (put it in quotes to make it text)"),
        ("MODEL.SPM.TEXT_QUERY_WEIGHT: 1", "at most 0.5", "1"),
        ("MODEL.HSMR: false", "MODEL.HSMR.ENABLED, MODEL.HSMR.WEIGHT or MODEL.HSMR.LEARNABLE_WEIGHT", "false"),
    ],
)
def test_a_wrong_value_is_reported_with_key_location_and_expectation(
    tmp_path: Path, text: str, expected: str, found: str
) -> None:
    key, _, value = text.partition(": ")
    message = problem_of(
        tmp_path, "".join(f"{{{part}: " for part in key.split(".")) + value + "}" * len(key.split("."))
    )
    assert message.startswith(f"{key} in x.yaml: expected ")
    assert expected in message
    assert message.endswith(f"found {found}.")
    assert problem_of(tmp_path, "", f"{key}={value}" if value != "''" else f"{key}=").startswith(
        f"{key} on the command line: expected "
    )


def test_an_overridden_wrong_value_does_not_matter(tmp_path: Path) -> None:
    assert load_text(tmp_path, "TRAIN: {SHOT: five}", "TRAIN.SHOT=5").config.TRAIN.SHOT == 5


def test_a_long_value_is_shortened(tmp_path: Path) -> None:
    assert len(problem_of(tmp_path, "TRAIN: {SHOT: " + "a" * 5000 + "}")) < 200


def test_an_option_without_a_default_is_required(tmp_path: Path) -> None:
    assert problem_of(tmp_path, "", f"MODEL.NAME={REQUIRED}").startswith("MODEL.WIDTH has no default")
    assert load_text(tmp_path, "", f"MODEL.NAME={REQUIRED}", "MODEL.WIDTH=3").config.MODEL.model_dump()["WIDTH"] == 3


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    text = "DEUG: 1\nTRAIN: {SHOT: x}\nMODEL: {HSMR: {WEIGHT: -1}, SEED: -1}\nDATA: 5"
    found = problem_of(tmp_path, text, "SOLVER.LR=x", "TRAIN", "INFO=[")
    keys = ("DEUG", "TRAIN.SHOT", "MODEL.HSMR.WEIGHT", "MODEL.SEED", "DATA", "SOLVER.LR", "KEY=VALUE", "INFO")
    assert len(found.splitlines()) == len(keys)
    assert all(key in found for key in keys)


@pytest.mark.parametrize("name", ["nosuch", "x" * 5000, "a/b", '"\\0"', "no.such:Method"])
def test_an_unknown_method_is_reported_without_its_options(tmp_path: Path, name: str) -> None:
    found = problem_of(tmp_path, f"TRIAN: 1\nMODEL: {{NAME: {name}, OPTION: 1, SEED: -1}}")
    assert len(found.splitlines()) == 3
    assert all(part in found for part in ("x.yaml: MODEL.NAME", "TRIAN", "MODEL.SEED in x.yaml"))


def test_a_wrong_option_is_the_only_reported_problem(tmp_path: Path) -> None:
    text = "TRAIN: {CACHED_FEATURES: true}\nMODEL: {TRAINABLE: head, HSMR: {WEIGHT: -1}}"
    assert problem_of(tmp_path, text).splitlines() == ["MODEL.HSMR.WEIGHT in x.yaml: expected at least 0, found -1."]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("TEST: {ONLY_TEST: true}", ["TEST.ONLY_TEST", "TEST.TEST_MODEL_PATH"]),
        ("DATA: {IMG_SIZE: 300}", ["DATA.SHORT_SIDE (256)", "DATA.IMG_SIZE (300)", "at least 300"]),
        ("DATA: {DATASET: hmdb52}", ["DATA.DATASET 'hmdb52'", "DATA.SPLIT_DIR", *DATASETS, "did you mean hmdb51?"]),
        ("TRAIN: {CACHED_FEATURES: true}", ["TRAIN.CACHED_FEATURES", "MODEL.TRAINABLE"]),
        ("TRAIN: {CHUNK: 2}\nMODEL: {FREEZE_BN: false}", ["TRAIN.CHUNK", "MODEL.FREEZE_BN"]),
    ],
)
def test_a_contradiction_names_both_keys_and_the_fix(tmp_path: Path, text: str, facts: list[str]) -> None:
    found = problem_of(tmp_path, text)
    assert all(fact in found for fact in [*facts, "set "])
    assert "\n" not in found
    assert len(problem_of(tmp_path, f"{text}\nDEUG: 1").splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ("NAME: otam, ADAPTER: aim", "MODEL.ADAPTER is aim"),
        ("NAME: clipfsar, ADAPTER: aim", "MODEL.ADAPTER is aim"),
        ("NAME: d2st", "MODEL.ADAPTER is d2st"),
        ("NAME: tsfsar", "MODEL.NAME is tsfsar"),
        ("NAME: otam, ADAPTER: none", ""),
        ("NAME: empnet", ""),
    ],
)
def test_cached_features_are_refused_for_trained_backbone_layers(tmp_path: Path, options: str, key: str) -> None:
    text = f"TRAIN: {{CACHED_FEATURES: true}}\nMODEL: {{TRAINABLE: head, {options}}}"
    if key:
        found = problem_of(tmp_path, text)
        assert "TRAIN.CACHED_FEATURES" in found
        assert key in found
    else:
        assert load_text(tmp_path, text).config.TRAIN.CACHED_FEATURES


def test_only_methods_that_accept_adapters_are_named_as_owners_of_the_key(tmp_path: Path) -> None:
    owners = problem_of(tmp_path, "MODEL: {NAME: a2m2, ADAPTER: aim}").partition("option of ")[2]
    assert "trx" in owners
    assert "strm" not in owners
    refused = problem_of(tmp_path, "MODEL: {NAME: strm, ADAPTER: aim}")
    assert all(fact in refused for fact in ("MODEL.ADAPTER", "expected none", "'aim'"))


def test_the_split_folder_follows_the_dataset(tmp_path: Path) -> None:
    assert split_directory(load_text(tmp_path, "").config) == Path("data/demo/splits")
    assert split_directory(load_text(tmp_path, "DATA: {DATASET: mine, SPLIT_DIR: my}").config) == Path("my")
    for name, folder in DATASETS.items():
        config = load_text(tmp_path, f"DATA: {{DATASET: {name}}}").config
        assert split_directory(config) == REPOSITORY / "splits" / folder


# ---------------------------------------------------------------- writing


def test_the_printed_config_is_yaml_with_aligned_origins(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, "INFO: 'a # b'\nTRAIN: {SHOT: 3}", "SOLVER.BETAS=[0.9, 0.99]")
    text = format_config(loaded)
    assert parse_yaml(text, "printed") == config_to_dict(loaded.config)
    lines = [line for line in text.splitlines() if not line.endswith(":")]
    assert {line.rindex("# ") for line in lines} == {lines[0].rindex("# ")}
    for start, origin in (("  SHOT: 3 ", tmp_path / "x.yaml"), ("  BETAS: [0.9, 0.99] ", "command line"),
                          ("    POOL: mean ", "default")):  # fmt: skip
        assert any(line.startswith(start) and line.endswith(f"# {origin}") for line in lines)


def test_a_stored_config_is_checked_like_a_file() -> None:
    data = json.loads(json.dumps(config_to_dict(Config(MODEL=ClipSpmOptions()))))
    assert config_from_dict(data) == Config(MODEL=ClipSpmOptions())
    assert config_from_dict(data, overrides=["TRAIN.SHOT=3"]).TRAIN.SHOT == 3
    data["TRAIN"]["SHOT"] = "five"
    with pytest.raises(UserError, match=r"^TRAIN\.SHOT in last\.pt: .* 'five'"):
        config_from_dict(data, "last.pt")
    with pytest.raises(UserError, match=r"^last\.pt: .*\[1\]"):
        config_from_dict([1], "last.pt")  # type: ignore[arg-type]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER_LIKE = st.sampled_from(["1e5", "no", "null", "~", "5", "1_0", "2024-01-01", ".5", "a: b", "#x", "*a", "- a", ""])
PROBABILITY = st.floats(0, 1, exclude_max=True)
IN_ONE_FOLDER = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@IN_ONE_FOLDER
@given(
    info=TEXT | NUMBER_LIKE,
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    betas=st.lists(PROBABILITY, min_size=2, max_size=2),
    schedule=st.integers(1) | st.lists(st.integers(1), max_size=3) | st.sampled_from(["none", "cosine"]),
    flip=st.none() | st.booleans(),
    alpha=st.floats(min_value=0, allow_nan=False, allow_infinity=False),
)
def test_a_saved_config_loads_equal(tmp_path: Path, info, rate, betas, schedule, flip, alpha) -> None:
    base = Config()
    config = Config(
        INFO=info,
        MODEL=ClipSpmOptions(SPM=SpmOptions(ALPHA=alpha)),
        SOLVER=base.SOLVER.model_copy(update={"LR": rate, "BETAS": betas, "LR_SCH": schedule}),
        DATA=base.DATA.model_copy(update={"FLIP": flip}),
    )
    save_config(config, tmp_path / "saved.yaml")
    loaded = load_config(tmp_path / "saved.yaml")
    assert loaded.config == config
    assert parse_yaml(format_config(loaded), "printed") == config_to_dict(config)


@IN_ONE_FOLDER
@given(
    key=st.sampled_from(sorted(KNOWN)),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=4,
    ),
)
def test_no_value_raises_anything_but_a_user_error(key: str, value: object) -> None:
    message = refusal(lambda: config_from_dict({key: value}, "x.yaml"))
    assert message is None or (key.split(".")[0] in message and "Input should" not in message)
