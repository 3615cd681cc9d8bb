"""Checkpoints are written whole or not at all, and reading one executes nothing."""

import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from episodes.splits import load_splits
from utils.checkpoint import file_digest, load_checkpoint, load_weights, save_checkpoint
from utils.config import load_config
from utils.errors import UserError


def test_a_saved_checkpoint_loads_equal(tmp_path: Path):
    model = nn.Linear(3, 2)
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"model": model.state_dict(), "episode": 7, "config": {"A": [1, None, "x"]}})
    content = load_checkpoint(path)
    assert content["episode"] == 7
    assert content["config"] == {"A": [1, None, "x"]}
    assert torch.equal(content["model"]["weight"], model.weight)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"episode": 1})
    before = file_digest(path)

    def full_disk(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*a\.pt.*No space left.*untouched"):
        save_checkpoint(path, {"episode": 2})
    assert file_digest(path) == before
    assert os.listdir(tmp_path) == ["a.pt"]


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_malicious_checkpoint_is_refused_without_running_code(tmp_path: Path, writer: str):
    target, path = tmp_path / "executed", tmp_path / "bad.pt"
    content = {"format": 1, "model": Payload(target)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"bad\.pt: refused"):
        load_checkpoint(path)
    assert not target.exists()


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "other"])
def test_a_damaged_or_foreign_file_is_reported_in_one_sentence(tmp_path: Path, damage: str):
    path = tmp_path / "bad.pt"
    save_checkpoint(path, {"model": torch.zeros(1000)})
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello", "truncated": content[: len(content) // 2], "other": b""}[damage])
    if damage == "other":
        torch.save({"weights": torch.zeros(1), "epoch": 1}, path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert "bad.pt" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_checkpoint_is_named():
    with pytest.raises(UserError, match=r"no such checkpoint: nowhere/best\.pt"):
        load_checkpoint(Path("nowhere/best.pt"))


def test_missing_relative_paths_are_named_with_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read in (
        lambda: load_checkpoint(Path("runs/best.pt")),
        lambda: load_config("run.yaml"),
        lambda: load_splits(Path("splits"), Path("videos"), ["test"]),
    ):
        with pytest.raises(UserError, match=re.escape(f"(in {tmp_path})")):
            read()
    with pytest.raises(UserError) as absolute:
        load_checkpoint(tmp_path / "best.pt")
    assert "(in " not in str(absolute.value)


def test_incompatible_weights_are_named_and_not_loaded():
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    weights = {"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}
    with pytest.raises(UserError) as error:
        load_weights(model, weights, Path("x.pt"))
    for part in ("x.pt", "1 missing, for example bias", "1 unknown, for example scale", "1 of another shape"):
        assert part in str(error.value)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("episode", [-1, 2**53, True, 1.5, None])
def test_an_implausible_number_of_episodes_is_refused(tmp_path: Path, episode: object):
    save_checkpoint(tmp_path / "bad.pt", {"model": {"w": torch.zeros(1)}, "episode": episode, "config": None})
    with pytest.raises(UserError, match="episode"):
        load_checkpoint(tmp_path / "bad.pt")
