"""A result names its matcher and every setting that differs from the default config, so that labels are unique."""

import pytest

from run.main_run import Learner
from run.results import MAX_SHOWN, differs_from_default, method_label, shown_differences
from run.run import shortened
from tests.helpers.shipped import ROOT
from tests.helpers.tiny_runs import tiny_config, trained
from utils.checkpoint import BEST
from utils.config import config_to_dict, load_config
from utils.errors import UserError


def differences(config: str, *overrides: str) -> list[str]:
    """Returns the differences of a run that is tested with its training config."""
    loaded = load_config(ROOT / "configs" / config, overrides).config
    return differs_from_default(loaded, config_to_dict(loaded))


@pytest.mark.parametrize(
    ("config", "override", "label", "directory"),
    [
        ("otam/demo.yaml", "MODEL.MATCHER=otam", "otam", "checkpoints/otam_demo"),
        ("otam/demo.yaml", "MODEL.MATCHER=mean", "otam[mean]", "checkpoints/mean_demo"),
        ("otam/hmdb51.yaml", "MODEL.MATCHER=bi-mhm", "otam[bi-mhm]", "checkpoints/bi-mhm_hmdb51"),
        ("cpm2c/demo.yaml", "MODEL.DISTANCES.MATCHER=mean", "cpm2c[mean]", "checkpoints/cpm2c_demo"),
        ("clipspm/demo.yaml", "TRAIN.SHOT=1", "clipspm", "checkpoints/clipspm_demo"),
    ],
)
def test_label_and_run_directory_name_the_matcher(config, override, label, directory):
    loaded = load_config(ROOT / "configs" / config, [override]).config
    assert (method_label(loaded), loaded.CHECKPOINT.CHECKPOINT_DIR) == (label, directory)
    assert differences(config, override) == []


def test_a_run_directory_substitutes_keys_and_refuses_unknown_ones():
    directory = "CHECKPOINT.CHECKPOINT_DIR=runs/{MODEL.BACKBONE}_{TRAIN.SHOT}shot"
    config = load_config(ROOT / "configs/otam/hmdb51.yaml", [directory, "MODEL.BACKBONE=ViT-B/16"]).config
    assert config.CHECKPOINT.CHECKPOINT_DIR == "runs/ViT-B-16_5shot"
    with pytest.raises(UserError, match=r"CHECKPOINT\.CHECKPOINT_DIR .*\{TRAIN\.SHOTS\}.*TRAIN\.SHOT"):
        load_config(ROOT / "configs/otam/hmdb51.yaml", ["CHECKPOINT.CHECKPOINT_DIR=runs/{TRAIN.SHOTS}"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), []),
        (("TRAIN.SHOT=5", "MODEL.SEED=9", "MODEL.BACKBONE=RN50", "TEST.TEST_EPISODES=9"), []),  # in the line anyway
        (("MODEL.COMPILE=true", "TRAIN.PRINT_FREQ=3", "DATA.NUM_WORKERS=0"), []),  # changes no number
        (("MODEL.HSMR.ENABLED=false", "MODEL.PADM.ENABLED=false"),
         ["MODEL.HSMR.ENABLED=false", "MODEL.PADM.ENABLED=false"]),
        (("TRAIN.TRAIN_EPISODES=7", "SOLVER.LR=1e-4"), ["TRAIN.TRAIN_EPISODES=7", "SOLVER.LR=0.0001"]),
        (("TRAIN.TRAIN_EPISODES=0", "SOLVER.LR=1e-4"), ["TRAIN.TRAIN_EPISODES=0"]),
        (("TRAIN.SHOT=5", "TEST.SHOT=1"), ["TRAIN.SHOT=5"]),
        (("TRAIN.VAL_FREQ=0", "TEST.QUERY_PER_CLASS=4"), ["TRAIN.VAL_FREQ=0", "TEST.QUERY_PER_CLASS=4"]),
        (("DATA.SEQ_LEN=4", "USE_AMP=true"), ["USE_AMP=true", "DATA.SEQ_LEN=4"]),
        (("DEBUG=true", "TRAIN.TRAIN_EPISODES=7", "MODEL.HSMR.ENABLED=false"), ["DEBUG", "MODEL.HSMR.ENABLED=false"]),
    ],
)  # fmt: skip
def test_differences_are_relative_to_the_shipped_config(overrides, expected):
    assert sorted(differences("clipspm/demo.yaml", *overrides)) == sorted(expected)


@pytest.mark.parametrize(
    ("config", "difference"),
    [("d2st/hmdb51.yaml", "SOLVER.LR_FACTORS=null"), ("clipfsar/hmdb51.yaml", "DATA.FLIP=null")],
)
def test_a_null_in_place_of_a_value_is_a_difference(config, difference):
    assert differences(config, difference) == [difference]


def test_without_a_shipped_config_differences_are_relative_to_defaults():
    own = ("DATA.DATASET=kitchen", "DATA.SPLIT_DIR=splits", "SOLVER.LR=0.5")
    assert differences("clipspm/hmdb51.yaml", *own) == []
    assert differences("clipspm/hmdb51.yaml", *own, "MODEL.SPM.ENABLED=false") == ["MODEL.SPM.ENABLED=false"]


def test_a_checkpoint_is_labelled_with_its_training_config():
    tested = load_config(ROOT / "configs/clipspm/demo.yaml", []).config
    changes = ["DATA.SAMPLING=segments", "TRAIN.TRAIN_EPISODES=3"]  # SAMPLING only affects training clips
    trained_with = load_config(ROOT / "configs/clipspm/demo.yaml", changes).config
    assert sorted(differs_from_default(tested, config_to_dict(trained_with))) == changes
    assert differs_from_default(tested, None) == []


def test_a_long_result_line_is_shortened_with_a_count():
    shown = shown_differences([f"KEY.{i}=1" for i in range(MAX_SHOWN + 3)])
    assert shown.count("KEY.") == MAX_SHOWN
    assert "3 more" in shown


def test_results_name_ablations_and_debug_runs(tiny_dataset, tmp_path, capsys):
    ablated = "MODEL.PADM.ENABLED=false"
    learner = trained(tiny_dataset, tmp_path / "run", ablated, "TRAIN.TRAIN_EPISODES=2")
    assert ablated in learner.test()["differs_from_default"]
    assert f", {ablated}" in capsys.readouterr().out
    only_test = ("TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={tmp_path / 'run' / BEST}")
    debug = tiny_config(tiny_dataset, tmp_path / "debug", ablated, "DEBUG=true", *only_test)
    results = Learner(shortened(debug)).test()
    assert results["differs_from_default"][0] == "DEBUG"
    line = capsys.readouterr().out
    assert "DEBUG RUN, NOT A RESULT" in line
    assert ablated in line
