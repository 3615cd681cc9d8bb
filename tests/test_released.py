"""Checkpoints of the released code are recognised, read without running code, mapped completely, and tested."""

import io
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import models
from benchmarks.released_fixtures import find_meta
from models.recognise import below, recognise_backbone, recognise_resnet
from models.released import (
    BACKBONE,
    OUR_BACKBONE,
    ReleasedNames,
    convert_released,
    implied_options,
    misfits,
    our_names,
    our_weights,
)
from run import convert as run_convert
from run.command import run_command
from tests.helpers.released import learner_of, released_content, released_state
from tests.helpers.shipped import ROOT, SHIPPED
from utils.checkpoint import STATE, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.weights import WRAPPERS, differences

FIXTURES = ROOT / "tests" / "fixtures" / "released"
METHODS = [name for name in SHIPPED if models.method_class(name).released.used]
# Released entries that the fixtures count as CLIP's own.
OF_TOWER = {"d2st": ("class_embedding", "ln_post.weight", "ln_post.bias")}


@pytest.mark.parametrize("method", METHODS)
def test_a_released_checkpoint_keeps_its_scores(method, tiny_dataset, tmp_path, caplog):
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
    unused = {f"{prefix}.weight" for prefix in models.method_class(method).released.unused}
    assert unused <= set(re.split(r"[,\s]+", caplog.text))


@pytest.mark.parametrize("method", METHODS)
def test_convert_recognises_the_method_and_writes_one_checkpoint(method, tiny_dataset, tmp_path, monkeypatch, capsys):
    source = learner_of(method, tiny_dataset, tmp_path / "source")
    released, ours = tmp_path / "released.pt", tmp_path / "ours.pt"
    torch.save(released_content(source, method), released)
    assert convert(monkeypatch, released, ours) == 0
    assert f"method: {method}" in capsys.readouterr().out
    content = load_checkpoint(ours)
    assert content["episode"] == 20010
    assert content["model"].keys() == source.model.state_dict().keys()
    assert convert(monkeypatch, released, ours) == 2
    assert "not overwritten" in capsys.readouterr().err
    only = ["TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={ours}"]
    assert learner_of(method, tiny_dataset, tmp_path / "run", *only).test()["episodes"] == 6


@pytest.mark.parametrize("method", METHODS)
def test_every_released_name_is_mapped_or_reported_for_one_method(method):
    _, meta, _ = find_meta(FIXTURES if (FIXTURES / f"{method}.npz").is_file() else FIXTURES.with_name("zoo"), method)
    state = {name: shape for name, shape in meta["shapes"].items() if name not in meta.get("not_in_state_dict", ())}
    state |= dict.fromkeys(OF_TOWER.get(method, ()))
    assert [other for other in METHODS if not misfits(state, models.method_class(other).released)] == [method]


@pytest.mark.parametrize("prefix", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_accuracy_is_read_from_files_of_old_and_new_numpy(tmp_path, prefix):
    """The module of NumPy's scalar function is part of the file; both names happen to have equal lengths."""
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


def test_only_numpy_scalars_are_unpickled(tmp_path):
    path = tmp_path / "released.pt"
    torch.save({STATE: {}, "acc": np.array([1.0, 2.0]), "path": Path("x")}, path)
    with pytest.raises(UserError, match="refused"):
        load_checkpoint(path)


@pytest.mark.parametrize("iteration", ["abc", float("nan"), None, 2.5])
def test_an_invalid_iteration_is_refused(tmp_path, iteration):
    path = tmp_path / "released.pt"
    torch.save({STATE: {}, "iteration": iteration}, path)
    with pytest.raises(UserError, match="does not describe its training run"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_method_is_refused_with_its_method():
    names = models.method_class("clipfsar").released
    content = {STATE: {"motion_conv1.weight": torch.zeros(1)}}
    with pytest.raises(UserError, match=r"1 entry .*, for example motion_conv1\.weight; set MODEL\.NAME"):
        convert_released(content, names, Path("x.pt"))


def test_names_match_at_dots_only():
    names = models.method_class("cpm2c").released
    assert our_names("scale", names) == ("scale",)
    assert our_names("scale_conv.weight", names) == ("motion.smooth.combine.weight",)
    assert our_names("class_token", names) != our_names("class_token_motion", names)
    assert our_names("scales", names) == ()


# Refused by convert: everything except a complete, finite model of the reported method


def convert(monkeypatch: pytest.MonkeyPatch, released: Path, ours: Path) -> int | str | None:
    """Runs the command in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["convert.py", str(released), str(ours)])
    with pytest.raises(SystemExit) as ended:
        run_command(run_convert.main)
    return ended.value.code


@pytest.fixture(scope="module")
def states(tiny_dataset, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the content that the released code would have saved for each method."""
    folder = tmp_path_factory.mktemp("states")
    return {
        method: released_content(learner_of(method, tiny_dataset, folder / method), method)[STATE]
        for method in ("clipspm", "cpm2c")
    }


def every_second(state: dict[str, torch.Tensor]) -> None:
    for name in list(state)[::2]:
        del state[name]


def without_tower(state: dict[str, torch.Tensor]) -> None:
    for name in [name for name in state if name.startswith(BACKBONE)]:
        del state[name]


def head_name(state: dict[str, torch.Tensor]) -> str:
    return next(name for name in state if name.endswith("to_out.0.bias"))


DAMAGE = {
    "every second entry is missing": every_second,
    "the tower is missing": without_tower,
    "one entry of the tower is missing": lambda state: state.pop("backbone.convolutions.4.running_mean"),
    "one entry of the head is missing": lambda state: state.pop(head_name(state)),
    "one more entry in the tower": lambda state: state.update({"backbone.attnpool.w": torch.zeros(2)}),
    "one more entry below a known name": lambda state: state.update({"context2.layers.0.1.net.9.w": torch.zeros(2)}),
    "another shape in the tower": lambda state: state.update({"backbone.convolutions.4.weight": torch.zeros(16)}),
    "another shape in the head": lambda state: state.update({head_name(state): torch.zeros(7)}),
    "whole numbers in the head": lambda state: state.update({head_name(state): state[head_name(state)].int()}),
    "truth values in the tower": lambda state: state.update(
        {"backbone.convolutions.4.weight": state["backbone.convolutions.4.weight"] > 0}
    ),
    "not finite": lambda state: state.update({head_name(state): state[head_name(state)] / 0}),
    "too large for a model": lambda state: state.update(
        {head_name(state): torch.full_like(state[head_name(state)], 1e300, dtype=torch.float64)}
    ),
    "another wrapper around a part": lambda state: state.update(
        {"loss.w": torch.zeros(2), **{f"model.{name}": state.pop(name) for name in list(state)}}
    ),
    "a view of one number": lambda state: state.update({head_name(state): torch.zeros(1).expand(128)}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_convert_refuses_incompatible_checkpoints_and_writes_nothing(damage, states, tmp_path, monkeypatch, capsys):
    state = dict(states["clipspm"])
    released = tmp_path / "released.pt"
    damage(state)
    torch.save({STATE: state, "iteration": 1}, released)
    assert convert(monkeypatch, released, tmp_path / "ours.pt") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["released.pt"]
    (line,) = capsys.readouterr().err.splitlines()
    assert str(released) in line


def adamw(parameters: int) -> dict[str, Any]:
    return {"state": {}, "param_groups": [{"params": [0]}, {"params": list(range(1, parameters))}]}


def test_an_incomplete_file_is_not_mistaken_for_a_smaller_method(states, tmp_path, monkeypatch, capsys):
    whole, names = states["cpm2c"], models.method_class("clipfsar").released
    smaller = {name: value for name, value in whole.items() if our_names(name, names)}
    path = tmp_path / "released.pt"
    parameters = sum("running_" not in name and "num_batches" not in name for name in whole)
    torch.save({STATE: smaller, "optimizer_state_dict": adamw(parameters)}, path)
    assert convert(monkeypatch, path, tmp_path / "ours.pt") == 2
    assert "optimizer_state_dict" in capsys.readouterr().err
    assert not (tmp_path / "ours.pt").exists()
    for optimizer in (adamw(parameters), {"param_groups": 3}, {"param_groups": [3, {"params": 3}]}):
        content = {STATE: whole, "optimizer_state_dict": optimizer}
        convert_released(content, models.method_class("cpm2c").released, path)


OTHER_FILES = {
    "only an optimizer": {"optimizer_state_dict": {"state": {}, "param_groups": []}, "iteration": 3},
    "two models": {"model": {"scale": torch.ones(1)}, "state_dict": {"scale": torch.ones(1)}},
    "no entries": {STATE: {}},
    "unknown entries": {STATE: {"a.w": torch.ones(1), "b.w": torch.ones(1)}},
    "a list": [1],
    "weights alone, of no method": {"a.w": torch.ones(1), "b.w": torch.ones(1)},
    "weights beside something else": {"scale": torch.ones(1), "epoch": 3},
    "a negative number of episodes": {STATE: {"scale": torch.ones(1)}, "iteration": -1},
    "an endless number of episodes": {STATE: {"scale": torch.ones(1)}, "iteration": 2**70},
}


@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES)
def test_convert_refuses_other_files_in_one_line(content, tmp_path, monkeypatch, capsys):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    assert convert(monkeypatch, path, tmp_path / "ours.pt") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["other.pt"]
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert "closest" not in line  # no method is near


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".txt"])
def test_convert_refuses_other_formats_in_one_line(suffix, states, tmp_path, monkeypatch, capsys):
    path = tmp_path / f"other{suffix}"
    if suffix == ".safetensors":
        save_file({"scale": torch.ones(1)}, path)
    elif suffix == ".npz":
        np.savez(path, scale=np.ones(1))
    else:
        path.write_text("hello\n")
    assert convert(monkeypatch, path, tmp_path / "ours.pt") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert not (tmp_path / "ours.pt").exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_convert_and_import_accept_bare_weights(suffix, states, tiny_dataset, tmp_path, monkeypatch, capsys):
    path, state = tmp_path / f"weights{suffix}", states["cpm2c"]
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    monkeypatch.setattr(sys, "argv", ["convert.py", str(path), str(tmp_path / "ours.pt")])
    run_convert.main()
    assert "method: cpm2c" in capsys.readouterr().out
    converted = load_checkpoint(tmp_path / "ours.pt")["model"]
    only = ["TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={path}"]
    learner = learner_of("cpm2c", tiny_dataset, tmp_path / "run", *only)
    assert learner.test()["episodes"] == 6
    assert all(torch.equal(value, converted[name]) for name, value in learner.model.state_dict().items())


def test_numpy_arrays_are_reported_as_such(tmp_path):
    np.savez(tmp_path / "weights.npz", scale=np.ones(1))
    with pytest.raises(UserError, match="NumPy arrays"):
        load_checkpoint(tmp_path / "weights.npz")


@pytest.mark.parametrize("wrapper", ["module.", "module._orig_mod.", "_forward_module.", "model.", "net.module."])
@pytest.mark.parametrize("level", ["first", "second"])
def test_convert_and_import_accept_wrapped_names(wrapper, level, states, tiny_dataset, tmp_path, monkeypatch, capsys):
    state = states["cpm2c"]

    if level == "second" and not set(wrapper.strip(".").split(".")) <= WRAPPERS:
        pytest.skip("a name of a user's own is a wrapper only around the whole model")

    def wrapped(name: str) -> str:
        first, dot, rest = name.partition(".")
        return f"{wrapper}{name}" if level == "first" or not dot else f"{first}.{wrapper}{rest}"

    released = tmp_path / "released.pt"
    torch.save({"state_dict": {wrapped(name): value for name, value in state.items()}}, released)
    monkeypatch.setattr(sys, "argv", ["convert.py", str(released), str(tmp_path / "ours.pt")])
    run_convert.main()
    assert "method: cpm2c" in capsys.readouterr().out
    converted = load_checkpoint(tmp_path / "ours.pt")["model"]
    only = ["TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={released}"]
    learner = learner_of("cpm2c", tiny_dataset, tmp_path / "run", *only)
    learner.test()
    found = learner.model.state_dict()
    assert converted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in converted.items())


def test_converting_a_native_checkpoint_is_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ours.pt"
    save_checkpoint(path, {"model": {"w": torch.zeros(1)}, "episode": 1, "config": None})
    assert convert(monkeypatch, path, tmp_path / "again.pt") == 2
    assert "no conversion" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "backbone", "size"),
    [("clipspm", "RN50", 224), ("cpm2c", "ViT-B-16", 224), ("clipfsar", "ViT-B-32", 96), ("clipspm", "RN101", 128)],
)
def test_a_released_model_is_recognised_by_its_shapes(method, backbone, size):
    learnable = {"HSMR": {"LEARNABLE_WEIGHT": True}} if method == "clipspm" else {}
    with torch.device("meta"):
        weights = models.build(method, size, BACKBONE=backbone, CLIP_WEIGHTS="random", **learnable).state_dict()
    assert recognise_backbone(below(OUR_BACKBONE, weights)) == (backbone, size)
    sizes = implied_options(weights, models.method_class(method).released)
    with torch.device("meta"):
        again = models.build(method, size, BACKBONE=backbone, CLIP_WEIGHTS="random", **sizes)
    assert differences(again.state_dict(), weights) == []


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50"])
def test_a_released_resnet_is_recognised_by_its_shapes(backbone):
    with torch.device("meta"):
        weights = models.build("trx", BACKBONE=backbone, WEIGHTS="random").state_dict()
    names = models.method_class("trx").released
    published = released_state({name: value for name, value in weights.items() if "encoder" in name}, names)
    assert {name.split(".")[1] for name in published} == {"0", "1", "4", "5", "6", "7"}
    assert recognise_resnet(below("encoder.visual.", our_weights(published, names))) == backbone


def test_rows_of_a_joined_entry_are_split_in_order():
    names = ReleasedNames({"to_qkv": ["query", "key", "value"], "norm": "norm"}, unused=["norm.bias"])
    found = our_weights({"to_qkv.weight": torch.arange(6.0)[:, None], "norm.weight": torch.ones(1)}, names)
    assert {name: value.flatten().tolist() for name, value in found.items()} == {
        "query.weight": [0, 1],
        "key.weight": [2, 3],
        "value.weight": [4, 5],
        "norm.weight": [1],
    }
    assert our_names("norm.bias", names) == ()
