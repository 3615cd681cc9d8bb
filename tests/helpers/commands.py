"""Commands in the process of the test: starting Python and PyTorch anew takes seconds, the command itself a moment."""

import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess

from run import prepare as prepare_module
from run import run as run_module
from run.command import exit_code_of

ROOT = Path(__file__).resolve().parents[2]


def in_process(main: Callable[[Sequence[str]], int | None], *words: object) -> CompletedProcess[str]:
    """Runs the main function of a command from the repository's root.

    Returns what a process of its own would return: exit code, standard output and standard error. Output of
    processes that the command starts is not in it.
    """
    arguments, streams = [str(word) for word in words], (io.StringIO(), io.StringIO())
    handlers, level, folder = logging.root.handlers[:], logging.root.level, os.getcwd()
    os.chdir(ROOT)
    try:
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
            code = exit_code_of(lambda: main(arguments))
    except SystemExit as end:  # of argparse
        code = int(end.code or 0)
    finally:
        os.chdir(folder)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
    return CompletedProcess([sys.executable, *arguments], code, streams[0].getvalue(), streams[1].getvalue())


def run(*words: object) -> CompletedProcess[str]:
    """Runs `run/run.py --cfg`."""
    return in_process(run_module.main, "--cfg", *words)


def prepare(*words: object, exit_code: int = 0) -> CompletedProcess[str]:
    """Runs `run/prepare.py`; its exit code has to be the given one."""
    workers = () if words[0] == "check" or "--workers" in words else ("--workers", 1)
    finished = in_process(prepare_module.main, *words, *workers)
    assert finished.returncode == exit_code, finished.stdout + finished.stderr
    return finished
