"""Running out of memory ends a command with one line that names settings and the page of advice."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from episodes.dataset import EpisodeDataset, VideoDataset
from run.command import USER_ERROR_EXIT, exit_code_of
from run.encoder import Encoder
from run.main_run import Learner
from tests.helpers.shipped import ROOT
from tests.helpers.tiny_runs import tiny_config
from utils.errors import MEMORY_PAGE, UserError
from utils.schema import Config

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4000 bytes."),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the last line that a command printed, the only line of its error."""
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu_old", "cpu_new", "python", "cublas", "cuda"])
def test_out_of_memory_is_reported_in_one_line_with_settings_and_page(
    tiny_dataset, tmp_path, monkeypatch, capsys, error
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    learner = Learner(tiny_config(tiny_dataset, tmp_path / "run"))
    monkeypatch.setattr(Encoder, "__call__", fail)
    assert exit_code_of(learner.train) == USER_ERROR_EXIT
    line = one_line(capsys)
    assert line.startswith("error: out of memory")
    assert all(fact in line for fact in ("TRAIN.CHUNK", "TEST.BATCH_EPISODES", MEMORY_PAGE))


def test_the_documented_settings_exist():
    page, _, heading = MEMORY_PAGE.partition("#")
    text = (ROOT / page).read_text(encoding="utf-8")
    section = text[text.lower().index(f"## {heading.replace('-', ' ')}") :]
    keys = set(re.findall(r"`((?:TRAIN|TEST|DATA|MODEL)\.[A-Z_]+)", section))
    assert {"TRAIN.CHUNK", "MODEL.ACTIVATION_CHECKPOINTING", "TEST.BATCH_EPISODES", "DATA.NUM_WORKERS"} <= keys
    for key in keys:
        group, name = key.split(".")
        assert hasattr(getattr(Config(), group), name), key


@pytest.mark.parametrize("dataset", [EpisodeDataset, VideoDataset])
def test_a_killed_worker_is_reported_in_one_line(tiny_dataset, tmp_path: Path, monkeypatch, capsys, dataset) -> None:
    own, read = os.getpid(), dataset.__getitem__

    def raise_killed(self, item):
        if os.getpid() != own:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, item)

    monkeypatch.setattr(dataset, "__getitem__", raise_killed)
    learner = Learner(tiny_config(tiny_dataset, tmp_path / "run", "DATA.NUM_WORKERS=1"))
    assert exit_code_of(learner.train) == USER_ERROR_EXIT
    line = one_line(capsys)
    assert all(fact in line for fact in ("worker was killed", "DATA.NUM_WORKERS", MEMORY_PAGE))


def test_other_errors_pass_through(capsys):
    def wrong_shapes() -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        exit_code_of(wrong_shapes)

    def mistake() -> None:
        raise UserError("TRAIN.WAY is 1")

    assert exit_code_of(mistake) == USER_ERROR_EXIT
    assert "memory" not in one_line(capsys)
