"""MODEL.COMPILE changes the speed of the backbone and nothing else."""

import functools
import logging
import shutil

import pytest
import torch

import models.frame_tower
from run.main_run import Learner
from tests.helpers.small_towers import KINDS, frames, tower
from tests.helpers.tiny_runs import tiny_config, trained
from utils.checkpoint import LAST, load_checkpoint

COMPILE = "MODEL.COMPILE=true"


@pytest.fixture
def quick_compiler(monkeypatch):
    """Traces without generating code, which would take a minute."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("kind", KINDS)
def test_compiling_keeps_features_gradients_and_names(kind, quick_compiler):
    found = []
    for compiled in (False, True):
        model = tower(kind, COMPILE=compiled)
        features = model(frames())
        features.square().sum().backward()
        found.append((features.detach(), {name: p.grad for name, p in model.named_parameters()}))
        assert list(model.state_dict()) == list(tower(kind).state_dict())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ViT", "RN"])
def test_a_compiled_tower_may_be_checkpointed(kind, quick_compiler):
    plain, both = (tower(kind, COMPILE=on, ACTIVATION_CHECKPOINTING=on) for on in (False, True))
    for model in (plain, both):
        model(frames()).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), both.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_compiled_run_writes_an_ordinary_checkpoint(quick_compiler, tiny_dataset, tmp_path, caplog):
    models.frame_tower._log_compile_times.cache_clear()
    found = trained(tiny_dataset, tmp_path / "run", COMPILE)
    results = found.test()
    assert "compiled the backbone in" in (tmp_path / "run" / "log.txt").read_text()
    assert not any("_orig_mod" in name for name in load_checkpoint(tmp_path / "run" / LAST)["model"])
    only = ("TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={tmp_path / 'run' / 'checkpoint_best.pt'}")
    plain = Learner(tiny_config(tiny_dataset, tmp_path / "plain", *only)).test()
    assert plain["per_episode"] == results["per_episode"]
    assert plain["differs_from_training"] == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler, g++")
def test_generated_code_computes_the_same_features():
    torch._dynamo.reset()
    plain, compiled = (tower("tiny", COMPILE=on).eval() for on in (False, True))
    with torch.no_grad():
        torch.testing.assert_close(compiled(frames()), plain(frames()), rtol=1e-4, atol=1e-5)


def test_compilation_time_is_logged(quick_compiler, caplog):
    models.frame_tower._log_compile_times.cache_clear()
    with caplog.at_level(logging.INFO):
        tower("tiny", COMPILE=True)(frames())
    assert "compiled the backbone in" in caplog.text
