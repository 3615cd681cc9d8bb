"""Videos are decoded in a process of their own, which a decoder may crash or hang without taking the run along.

Decoders are large programs in C, and a damaged file can make one end its process or never return; nothing inside that
process could help then. So each thread that reads video files has a helper process (episodes/decoding_process.py),
asks it for one video after the other, and replaces it when it dies. A video whose reading kills the helper twice, the
second time without decord, is refused like any other broken one. Images are read here: Pillow holds its own limits.

The two talk in lines of JSON, and the frames follow as plain bytes, so that nothing is unpickled.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from episodes import cut_off, video
from episodes.limits import LARGEST_MEMORY, LONGEST_READING
from utils.errors import UserError
from videotransforms.volume_transforms import FrameChooser

REPOSITORY = str(Path(__file__).resolve().parents[1])
HELPER = "import sys; sys.path[0] = sys.argv[1]; from episodes.decoding_process import main; main(sys.argv[2:])"
MEMORY_EXIT = 3  # exit code of a helper that would need more than LARGEST_MEMORY
READS_PER_HELPER = 1000  # decord loses some memory with each video
PIPE_BYTES = 1024**2  # Linux's own 64 KiB would hand a clip over in dozens of pieces


def read_frames(path: Path, choose: FrameChooser) -> np.ndarray:
    """Do what `video.read_frames` does, safe from crashes and hangs: uint8 [T, H, W, 3].

    Raises the same errors, and UserError for a video that cannot be decoded within the limits.
    """
    if not os.path.isfile(path):
        return video.read_frames(path, choose)
    return _ask(path, {"do": "read_frames"}, _Once(choose))


def probe(path: Path, enough: int = 1) -> int:
    """Do what `video.probe` does, safe from crashes and hangs."""
    if not os.path.isfile(path):
        return video.probe(path, enough)
    return _ask(path, {"do": "probe", "enough": enough}, None)


def share_present(path: Path) -> float:
    """Do what `cut_off.share_present` does, safe from crashes and hangs."""
    if not os.path.isfile(path):
        return cut_off.share_present(path)
    return _ask(path, {"do": "share_present"}, None)


class _Once:
    """A frame chooser that draws once for each number of frames: a second attempt gets the same answer."""

    def __init__(self, choose: FrameChooser) -> None:
        self.choose = choose
        self.answers: dict[int, list[int]] = {}

    def __call__(self, count: int) -> list[int]:
        if count not in self.answers:
            self.answers[count] = [int(index) for index in self.choose(count)]
        return self.answers[count]


class _HelperDiedError(Exception):
    """The helper ended in the middle of a video; the message says why."""


_deadly: dict[Path, str] = {}  # video -> why it was refused; another attempt would take as long again


def _ask(path: Path, request: dict[str, Any], choose: _Once | None) -> Any:
    """Have a helper do the request; once more, with PyAV alone, when it dies of it."""
    if path in _deadly:
        raise UserError(_deadly[path])
    try:
        return _helper().do(path, request, choose)
    except _HelperDiedError:
        careful = _Helper(use_decord=False)
    try:
        return careful.do(path, request, choose)
    except _HelperDiedError as error:
        _deadly[path] = f"Decoding the video {path} {error}: convert it, or remove it from the list."
        raise UserError(_deadly[path]) from error
    finally:
        careful.close()


class _Helper:
    """A process that decodes videos, and our ends of the two pipes to it."""

    def __init__(self, use_decord: bool = True) -> None:
        options = [] if use_decord else ["without-decord"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", HELPER, REPOSITORY, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.reads = 0
        self.owner = os.getpid()
        self.close = weakref.finalize(self, _close, self.process, self.owner)
        assert self.process.stdout is not None
        _widen(self.process.stdout.fileno())
        if not self.process.stdout.readline():
            raise RuntimeError(f"the process that decodes videos did not start (exit code {self.process.wait()})")

    def do(self, path: Path, request: dict[str, Any], choose: _Once | None) -> Any:
        """Send a request and return what it gives. Raises UserError for a broken video, _HelperDiedError."""
        self.reads += 1
        try:
            self._send(request | {"path": os.fspath(path)})
            while "count" in (answer := self._receive()):
                assert choose is not None
                self._send({"indices": choose(answer["count"])})
            if "shape" in answer:
                return self._receive_frames(answer["shape"])
        except (BrokenPipeError, EOFError):
            raise _HelperDiedError(self._cause_of_death()) from None
        except BaseException:
            self.close()  # what it says next would be taken for the answer to another question
            raise
        if "broken" in answer:
            raise UserError(answer["broken"])
        if "index" in answer:
            raise IndexError(answer["index"])
        if "defect" in answer:
            raise RuntimeError(answer["defect"])
        return answer["value"]

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)

    def _receive_frames(self, shape: list[int]) -> np.ndarray:
        """The frames behind the line that gave their shape: uint8 [T, H, W, 3]."""
        assert self.process.stdout is not None
        frames = np.empty(shape, dtype=np.uint8)
        if self.process.stdout.readinto(frames.data.cast("B")) != frames.nbytes:  # type: ignore[attr-defined]
            raise EOFError
        return frames

    def _cause_of_death(self) -> str:
        """What ended the helper, as the second half of a sentence."""
        self.close()
        code = self.process.returncode
        if code == -signal.SIGALRM:
            return f"takes longer than {LONGEST_READING} seconds"
        if code == MEMORY_EXIT:
            return f"takes more than {LARGEST_MEMORY // 1024**3} GiB of memory"
        return f"crashes the decoder ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def _widen(pipe: int) -> None:
    """Let a pipe hold more, where the system can."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _close(process: "subprocess.Popen[bytes]", owner: int) -> None:
    """End a helper; in a forked child, which has only copies of the pipes' ends, close these."""
    assert process.stdin is not None
    assert process.stdout is not None
    if os.getpid() == owner:
        process.kill()
        process.wait()
    else:
        process.returncode = 0  # not ours to wait for
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # what was not sent is of no interest
        process.stdin.close()


_thread = threading.local()


def _helper() -> _Helper:
    """This thread's helper: the one that it has, or a new one."""
    helper: _Helper | None = getattr(_thread, "helper", None)
    if helper is not None and helper.close.alive and helper.owner == os.getpid() and helper.reads < READS_PER_HELPER:
        return helper
    if helper is not None:
        helper.close()
    _thread.helper = _Helper()
    return _thread.helper
