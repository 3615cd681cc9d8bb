"""Commands run in the process of the test, since a new process needs seconds to load PyTorch."""

import importlib
import io
import logging
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import torch

from run.command import exit_code_of
from tests.helpers.shipped import ROOT
from tests.helpers.tiny_dataset import TinyDataset

# Shrinks any shipped config to a run of a few seconds on the tiny data set.
SMALL = (
    "MODEL.BACKBONE=tiny", "MODEL.CLIP_WEIGHTS=random", "DATA.SEQ_LEN=4", "DATA.IMG_SIZE=32", "DATA.SHORT_SIDE=36",
    "DATA.NUM_WORKERS=0", "TRAIN.SHOT=1", "TRAIN.QUERY_PER_CLASS=1", "DEVICE.DEVICE=cpu", "DEBUG=true",
)  # fmt: skip


def tiny_overrides(data: TinyDataset, directory: Path) -> list[str]:
    """Returns the overrides that make a shipped config a short run on the tiny data set."""
    return [
        *SMALL, "DATA.DATASET=tiny", f"DATA.DATA_DIR={data.videos}", f"DATA.SPLIT_DIR={data.splits}",
        f"CHECKPOINT.CHECKPOINT_DIR={directory}",
    ]  # fmt: skip


def in_process(script: str, *words: object) -> CompletedProcess[str]:
    """Calls the `main` of a script, such as run/run.py, from the repository's root.

    Returns the exit code, standard output and standard error, without the output of processes that the command starts.
    """
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    arguments, streams = [script, *map(str, words)], (io.StringIO(), io.StringIO())
    handlers, level = logging.root.handlers[:], logging.root.level
    folder, threads = os.getcwd(), torch.get_num_threads()
    os.chdir(ROOT)
    try:
        with mock.patch.object(sys, "argv", arguments), redirect_stdout(streams[0]), redirect_stderr(streams[1]):
            code = exit_code_of(main)
    except SystemExit as end:  # of argparse
        code = int(end.code or 0)
    finally:
        os.chdir(folder)
        torch.set_num_threads(threads)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
    return CompletedProcess(arguments, code, streams[0].getvalue(), streams[1].getvalue())


def main_command(*words: object) -> CompletedProcess[str]:
    """Runs `run/run.py --cfg`."""
    return in_process("run/run.py", "--cfg", *words)


def sentences_of(finished: CompletedProcess[str]) -> list[str]:
    """Returns the message of a refused command: exit code 2, no traceback, nothing on standard output."""
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""
    return finished.stderr.strip().splitlines()


def prepare(*words: object, exit_code: int = 0) -> CompletedProcess[str]:
    """Runs `run/prepare.py` and asserts its exit code."""
    workers = () if words[0] == "check" or "--workers" in words else ("--workers", 1)
    finished = in_process("run/prepare.py", *words, *workers)
    assert finished.returncode == exit_code, finished.stdout + finished.stderr
    return finished
