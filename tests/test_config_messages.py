"""Each mistake in a config is one sentence that names the key, the place and the way out."""

from pathlib import Path

import pytest

from tests.config_helpers import load_text, problem_of
from utils.config import (
    REPOSITORY,
    split_directory,
)
from utils.schema import DATASETS, Config

# ---------------------------------------------------------------- unknown keys

TOP_KEYS = ", ".join(Config.model_fields)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("DEUG: true", "x.yaml: unknown key DEUG; did you mean DEBUG?"),
        ("TRIAN: {SHOT: 1}", "x.yaml: unknown key TRIAN; did you mean TRAIN?"),
        ("TRAIN: {SHOTS: 1}", "x.yaml: unknown key TRAIN.SHOTS; did you mean TRAIN.SHOT?"),
        ("train: {SHOT: 1}", "x.yaml: unknown key train; did you mean TRAIN?"),
        ("TRAIN: {LR: 1}", "x.yaml: unknown key TRAIN.LR; did you mean SOLVER.LR?"),
        ("SHOT: 1", "x.yaml: unknown key SHOT; did you mean TRAIN.SHOT or TEST.SHOT?"),
        ("MODEL: {HMSR: {ENABLED: true}}", "x.yaml: unknown key MODEL.HMSR; did you mean MODEL.HSMR?"),
        ("MODEL: {HSMR: {HEAD: 1}}", "x.yaml: unknown key MODEL.HSMR.HEAD; did you mean MODEL.HSMR.HEADS?"),
        ("MODEL: {GAMMA: 1}", "x.yaml: unknown key MODEL.GAMMA for this MODEL.NAME; it is an option of otam."),
        ("MODEL: {SPM: {qq: 1}}", "x.yaml: unknown key MODEL.SPM.qq; MODEL.SPM has ENABLED, LAMBDA."),
        ("5: 1", f"x.yaml: unknown key 5; a config has {TOP_KEYS}."),
        ("'': 1", f"x.yaml: unknown key ''; a config has {TOP_KEYS}."),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path, text: str, words: str) -> None:
    assert problem_of(tmp_path, text) == words


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("TRAIN.SHOTT=5", "TRAIN.SHOTT; did you mean TRAIN.SHOT?"),
        ("TRIAN.SHOT=5", "TRIAN.SHOT; did you mean TRAIN.SHOT?"),
        ("TRAIN.SHOT.X=5", "TRAIN.SHOT.X; did you mean TRAIN.SHOT?"),
        ("MODEL.HMSR.ENABLED=false", "MODEL.HMSR.ENABLED; did you mean MODEL.HSMR.ENABLED?"),
        ("MODEL.HSMR.X=false", "MODEL.HSMR.X; MODEL.HSMR has ENABLED, HEADS, KIND."),
    ],
)
def test_an_unknown_key_on_the_command_line_is_told_in_full(tmp_path: Path, override: str, words: str) -> None:
    assert problem_of(tmp_path, "", override) == f"command line: unknown key {words}"


@pytest.mark.parametrize("argument", ["TRAIN.SHOT", "=5", "", " =5"])
def test_an_override_without_key_or_equals_sign_is_a_user_error(tmp_path: Path, argument: str) -> None:
    expected = f"command line: expected KEY=VALUE such as TRAIN.SHOT=5, found {argument!r}."
    assert problem_of(tmp_path, "", argument) == expected


def test_an_override_with_broken_yaml_names_its_key(tmp_path: Path) -> None:
    assert problem_of(tmp_path, "", "SOLVER.BETAS=[0.9").startswith(
        "SOLVER.BETAS on the command line, line 1: not a valid"
    )


def test_options_of_the_old_method_are_refused_when_the_method_changes(tmp_path: Path) -> None:
    expected = "x.yaml: unknown key MODEL.HSMR for this MODEL.NAME; it is an option of clipspm."
    assert problem_of(tmp_path, "MODEL: {HSMR: {HEADS: 2}}", "MODEL.NAME=otam") == expected


def test_an_unknown_method_is_reported_once_and_not_its_options(tmp_path: Path) -> None:
    found = problem_of(tmp_path, "MODEL: {NAME: nosuch, OPTION: 1, SEED: -1}")
    assert found.splitlines() == [
        "x.yaml: MODEL.NAME: unknown method 'nosuch', known are clipspm, otam",
        "MODEL.SEED in x.yaml: expected at least 0, found -1.",
    ]


# ---------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("TRAIN: {SHOT: five}", "TRAIN.SHOT in x.yaml: expected a whole number, found 'five'."),
        ("TRAIN: {SHOT: '8'}", "TRAIN.SHOT in x.yaml: expected a whole number, found '8'."),
        ("TRAIN: {SHOT: true}", "TRAIN.SHOT in x.yaml: expected a whole number, found true."),
        ("TRAIN: {SHOT: 1.5}", "TRAIN.SHOT in x.yaml: expected a whole number, found 1.5."),
        ("TRAIN: {SHOT: null}", "TRAIN.SHOT in x.yaml: expected a whole number, found null."),
        ("TRAIN: {SHOT: 0}", "TRAIN.SHOT in x.yaml: expected at least 1, found 0."),
        ("TRAIN: {WAY: 1}", "TRAIN.WAY in x.yaml: expected at least 2, found 1."),
        ("TEST: {SHOT: x}", "TEST.SHOT in x.yaml: expected a whole number or null, found 'x'."),
        ("TEST: {SHOT: 0}", "TEST.SHOT in x.yaml: expected at least 1, found 0."),
        ("DEBUG: 1", "DEBUG in x.yaml: expected true or false, found 1."),
        ("DEBUG: 'yes'", "DEBUG in x.yaml: expected true or false, found 'yes'."),
        ("DATA: {FLIP: 1}", "DATA.FLIP in x.yaml: expected true or false or null, found 1."),
        ("SOLVER: {LR: fast}", "SOLVER.LR in x.yaml: expected a number, found 'fast'."),
        ("SOLVER: {LR: true}", "SOLVER.LR in x.yaml: expected a number, found true."),
        ("SOLVER: {LR: 0}", "SOLVER.LR in x.yaml: expected more than 0, found 0."),
        ("SOLVER: {LR: .inf}", "SOLVER.LR in x.yaml: expected a finite number, found inf."),
        ("SOLVER: {LR: .nan}", "SOLVER.LR in x.yaml: expected a finite number, found nan."),
        ("SOLVER: {MOMENTUM: 1}", "SOLVER.MOMENTUM in x.yaml: expected less than 1, found 1."),
        ("SOLVER: {BETAS: 0.9}", "SOLVER.BETAS in x.yaml: expected a list of 2 numbers, found 0.9."),
        ("SOLVER: {BETAS: [0.9]}", "SOLVER.BETAS in x.yaml: expected a list of 2 numbers, found [0.9]."),
        ("SOLVER: {BETAS: [0, x]}", "SOLVER.BETAS in x.yaml: expected a list of 2 numbers, found [0, 'x']."),
        ("SOLVER: {BETAS: [0, 1]}", "SOLVER.BETAS in x.yaml: expected less than 1, found [0, 1]."),
        (
            "SOLVER: {LR_SCH: step}",
            "SOLVER.LR_SCH in x.yaml: expected a whole number, a list of whole numbers or one of none, cosine, "
            "found 'step'.",
        ),
        ("SOLVER: {LR_SCH: 0}", "SOLVER.LR_SCH in x.yaml: expected at least 1, found 0."),
        ("SOLVER: {OPTIM_METHOD: lion}", "SOLVER.OPTIM_METHOD in x.yaml: expected one of adam, sgd, found 'lion'."),
        ("INFO: 8", "INFO in x.yaml: expected text, found 8 (put it in quotes to make it text)."),
        ("MODEL: {NAME: ''}", "MODEL.NAME in x.yaml: expected text, found an empty one."),
        ("MODEL: {NAME: [a]}", "MODEL.NAME in x.yaml: expected text, found ['a'] (put it in quotes to make it text)."),
        ("MODEL: {HSMR: {HEADS: 0}}", "MODEL.HSMR.HEADS in x.yaml: expected at least 1, found 0."),
        ("MODEL: {HSMR: {KIND: x}}", "MODEL.HSMR.KIND in x.yaml: expected one of motion, plain, found 'x'."),
        ("MODEL: {SPM: {LAMBDA: 13}}", "MODEL.SPM.LAMBDA must not be 13 while MODEL.SPM.ENABLED is true."),
        ("TRAIN: {SHOT: {A: 1}}", "TRAIN.SHOT in x.yaml: expected a whole number, found a section with the keys A."),
        (
            "TRAIN: 5",
            "TRAIN in x.yaml: expected a section with keys such as TRAIN.WAY, TRAIN.SHOT or TRAIN.QUERY_PER_CLASS, "
            "found 5.",
        ),
        (
            "MODEL: {HSMR: false}",
            "MODEL.HSMR in x.yaml: expected a section with keys such as MODEL.HSMR.ENABLED, MODEL.HSMR.HEADS or "
            "MODEL.HSMR.KIND, found false.",
        ),
    ],
)
def test_a_wrong_value_names_key_place_expectation_and_finding(tmp_path: Path, text: str, words: str) -> None:
    assert problem_of(tmp_path, text) == words


def test_a_wrong_value_on_the_command_line_says_so(tmp_path: Path) -> None:
    assert (
        problem_of(tmp_path, "", "TRAIN.SHOT=x")
        == "TRAIN.SHOT on the command line: expected a whole number, found 'x'."
    )


def test_a_wrong_value_that_is_overridden_does_not_matter(tmp_path: Path) -> None:
    assert load_text(tmp_path, "TRAIN: {SHOT: five}", "TRAIN.SHOT=5").config.TRAIN.SHOT == 5


def test_a_long_value_is_shortened(tmp_path: Path) -> None:
    assert len(problem_of(tmp_path, "TRAIN: {SHOT: " + "a" * 5000 + "}")) < 200


def test_a_method_option_without_a_default_must_be_given(tmp_path: Path) -> None:
    expected = "MODEL.WIDTH has no default: set it to a whole number."
    assert problem_of(tmp_path, "", "MODEL.NAME=required") == expected


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    found = problem_of(
        tmp_path, "DEUG: 1\nTRAIN: {SHOT: x}\nMODEL: {HSMR: {HEADS: 0}}\nDATA: 5", "SOLVER.LR=x", "TRAIN"
    )
    assert len(found.splitlines()) == 6
    for key in ("DEUG", "TRAIN.SHOT", "MODEL.HSMR.HEADS", "DATA", "SOLVER.LR", "KEY=VALUE"):
        assert key in found


# ---------------------------------------------------------------- rules on two keys


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("TEST: {ONLY_TEST: true}", ["TEST.ONLY_TEST", "TEST.TEST_MODEL_PATH"]),
        ("DATA: {IMG_SIZE: 300}", ["DATA.SHORT_SIDE (256)", "DATA.IMG_SIZE (300)", "at least 300"]),
        (
            "TEST: {ONLY_TEST: true, TEST_MODEL_PATH: a.pt}\nCHECKPOINT: {RESUME_FROM_CHECKPOINT: true}",
            ["TEST.ONLY_TEST", "CHECKPOINT.RESUME_FROM_CHECKPOINT"],
        ),
        ("DATA: {DATASET: hmdb52}", ["DATA.DATASET 'hmdb52'", "DATA.SPLIT_DIR", *DATASETS, "did you mean hmdb51?"]),
    ],
)
def test_a_contradiction_names_both_keys_and_the_fix(tmp_path: Path, text: str, keys: list[str]) -> None:
    found = problem_of(tmp_path, text)
    assert all(key in found for key in keys)
    assert "set " in found
    assert "\n" not in found


def test_contradictions_are_reported_together_with_unknown_keys(tmp_path: Path) -> None:
    assert len(problem_of(tmp_path, "TEST: {ONLY_TEST: true}\nDATA: {IMG_SIZE: 300}\nDEUG: 1").splitlines()) == 3


def test_a_dataset_of_ones_own_needs_its_split_folder(tmp_path: Path) -> None:
    config = load_text(tmp_path, "DATA: {DATASET: mine, SPLIT_DIR: my/split}").config
    assert split_directory(config) == Path("my/split")


def test_the_split_folder_follows_the_dataset(tmp_path: Path) -> None:
    assert split_directory(load_text(tmp_path, "").config) == Path("data/demo/splits")
    for name, folder in DATASETS.items():
        config = load_text(tmp_path, f"DATA: {{DATASET: {name}}}").config
        assert split_directory(config) == REPOSITORY / "splits" / folder
