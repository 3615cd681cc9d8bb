"""The process that decodes videos for another one, see episodes/isolation.py: it may crash, hang or be killed."""

import contextlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from episodes import cut_off, video
from episodes.isolation import MEMORY_EXIT
from episodes.limits import LARGEST_MEMORY, LONGEST_READING
from utils.errors import UserError

# They reach all processes of a job; the one that we read for decides what they mean, and our input ends with it.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(options: Sequence[str]) -> None:
    """Answer the requests on standard input until it ends; `without-decord` is the only option."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also inside a decoder
    with contextlib.suppress(ValueError, OSError):  # a lower limit holds already, or the system has none
        resource.setrlimit(resource.RLIMIT_AS, (LARGEST_MEMORY, LARGEST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    video.torch_first = False
    video.use_decord = "without-decord" not in options
    video._decord()
    _silence()
    _say(answers, {"ready": True})
    for line in requests:
        signal.alarm(LONGEST_READING)
        try:
            _answer(json.loads(line), requests, answers)
        except MemoryError:
            os._exit(MEMORY_EXIT)
        signal.alarm(0)


def _silence() -> None:
    """Give standard output and error to nobody: decoders print what they like."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _answer(request: dict[str, Any], requests: IO[bytes], answers: IO[bytes]) -> None:
    """Do one request and say what came of it."""

    def choose(count: int) -> np.ndarray:
        _say(answers, {"count": count})
        return np.array(json.loads(requests.readline())["indices"], dtype=np.int64)

    path = Path(request["path"])
    try:
        if request["do"] == "probe":
            _say(answers, {"value": video.probe(path, request["enough"])})
            return
        if request["do"] == "share_present":
            _say(answers, {"value": cut_off.share_present(path)})
            return
        frames = np.ascontiguousarray(video.read_frames(path, choose))
    except UserError as error:
        _say(answers, {"broken": str(error)})
    except IndexError as error:
        _say(answers, {"index": str(error)})
    except MemoryError:
        raise
    except Exception:
        _say(answers, {"defect": traceback.format_exc()})
    else:
        _say(answers, {"shape": frames.shape})
        answers.write(frames.data.cast("B"))
        answers.flush()


def _say(answers: IO[bytes], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()
