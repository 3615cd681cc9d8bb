"""Checkpoints of the published code are recognised, read without running anything, mapped whole, and tested."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from run.main_run import Learner
from tests.shipped import SHIPPED
from tests.test_learner import DEMO, ROOT, tiny_config
from utils.checkpoint import STATE, load_checkpoint
from utils.config import load_config
from utils.errors import UserError
from utils.released import BACKBONE, OUR_BACKBONE, convert_released, misfits, our_name

FIXTURES = ROOT / "tests" / "fixtures" / "released"
METHODS = [name for name in SHIPPED if models.method_class(name).released.used]
# What the published code trains; our option for the loss weight, off by default, is on there.
OPTIONS: dict[str, list[str]] = {"clipspm": ["MODEL.HSMR.LEARNABLE_WEIGHT=true"], "clipfsar": [], "cpm2c": []}


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
    return Learner(load_config(config_of(method), [*small, *OPTIONS[method], *overrides]).config)


def released_content(learner: Learner, method: str) -> dict[str, Any]:
    """What the published code would have saved of these weights."""
    names = models.method_class(method).released
    back = {ours: theirs for theirs, ours in names.used.items()}

    def released_name(name: str) -> str:
        if name.startswith(OUR_BACKBONE):
            return BACKBONE + name.removeprefix(OUR_BACKBONE)
        ours = next(prefix for prefix in back if name == prefix or name.startswith(prefix + "."))
        return back[ours] + name.removeprefix(ours)

    state = {released_name(name): value for name, value in learner.model.state_dict().items()}
    state |= {f"{prefix}.weight": torch.zeros(2) for prefix in names.unused}
    return {
        "iteration": 20010,
        STATE: state,
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-5}]},
        "scheduler": {"milestones": [1000000]},
        "acc": np.float64(77.4),
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_released_checkpoint_gives_the_scores_of_its_weights(method, tiny_dataset, tmp_path, caplog):
    torch.manual_seed(3)
    source = learner_of(method, tiny_dataset, tmp_path / "source")
    expected = {name: value.clone() for name, value in source.model.state_dict().items()}
    path = tmp_path / "released.pt"
    torch.save(released_content(source, method), path)

    only = ["TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={path}", "MODEL.SEED=9"]
    learner = learner_of(method, tiny_dataset, tmp_path / "run", *only)
    with caplog.at_level("INFO"):
        results = learner.test()
    assert all(torch.equal(value, expected[name]) for name, value in learner.model.state_dict().items())
    assert results["checkpoint_selected_on"] == "test"
    assert results["checkpoint_episodes"] == 20010
    for unused in models.method_class(method).released.unused:
        assert unused in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_convert_recognises_the_method_and_writes_ours_once(method, tiny_dataset, tmp_path):
    source = learner_of(method, tiny_dataset, tmp_path / "source")
    released, ours = tmp_path / "released.pt", tmp_path / "ours.pt"
    torch.save(released_content(source, method), released)
    command = [sys.executable, "run/convert.py", str(released), str(ours)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert f"method: {method}" in finished.stdout
    content = load_checkpoint(ours)
    assert content["episode"] == 20010
    assert content["model"].keys() == source.model.state_dict().keys()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "not overwritten" in again.stderr
    only = ["TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={ours}"]
    assert learner_of(method, tiny_dataset, tmp_path / "run", *only).test()["episodes"] == 6


@pytest.mark.parametrize("method", METHODS)
def test_every_released_name_is_used_or_named_and_no_other_method_takes_it(method):
    state = json.loads((FIXTURES / "meta.json").read_text())["shapes"][method]
    assert [other for other in METHODS if not misfits(state, models.method_class(other).released)] == [method]


@pytest.mark.parametrize("prefix", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_the_accuracy_is_read_from_files_of_old_and_new_numpy(tmp_path, prefix):
    """The place of NumPy's scalar function is part of the file; both spellings have one length only by luck."""
    path = tmp_path / "released.pt"
    torch.save({STATE: {}, "acc": np.float64(1.5)}, path)
    content = path.read_bytes()
    written = next(p for p in (b"numpy._core.multiarray", b"numpy.core.multiarray") if p in content)
    if prefix.encode() != written:
        buffer = io.BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name).replace(written, prefix.encode()))
        path.write_bytes(buffer.getvalue())
    assert float(load_checkpoint(path)["acc"]) == 1.5


def test_nothing_but_the_scalars_is_let_in(tmp_path):
    path = tmp_path / "released.pt"
    torch.save({STATE: {}, "acc": np.array([1.0, 2.0]), "path": Path("x")}, path)
    with pytest.raises(UserError, match="refused"):
        load_checkpoint(path)


@pytest.mark.parametrize("iteration", ["abc", float("nan"), None, 2.5])
def test_an_iteration_that_is_no_number_of_episodes_is_refused(tmp_path, iteration):
    path = tmp_path / "released.pt"
    torch.save({STATE: {}, "iteration": iteration}, path)
    with pytest.raises(UserError, match="does not say how it was trained"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_method_is_refused_by_name():
    names = models.method_class("clipfsar").released
    content = {STATE: {"motion_conv1.weight": torch.zeros(1)}}
    with pytest.raises(UserError, match=r"unknown to the method, for example motion_conv1\.weight; set MODEL\.NAME"):
        convert_released(content, names, Path("x.pt"))


def test_names_match_at_dots_only():
    names = models.method_class("cpm2c").released
    assert our_name("scale", names) == "scale"
    assert our_name("scale_conv.weight", names) == "motion.smooth.combine.weight"
    assert our_name("class_token", names) != our_name("class_token_motion", names)
    assert our_name("scales", names) is None
