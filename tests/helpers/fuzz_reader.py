"""Reads damaged videos and images, thousands of them, and counts the outcomes.

    python tests/helpers/fuzz_reader.py --mutants 1000
    python tests/helpers/fuzz_reader.py --mutants 1000 --reader direct    # without the process that shields the run

Mutant i is a function of (seed, i) alone: small intact files of several containers and codecs, and folders of
images, in which bits, numbers, headers or whole pieces are changed. Each is read in a child process with a time
limit, so that crashes and hangs are counted. The exit code is 1 if there was any outcome other than
frames or a sentence for the user.
"""

import argparse
import io
import multiprocessing
import re
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import av
import numpy as np
from PIL import Image

from episodes import decoding, video
from utils.errors import UserError
from videotransforms.volume_transforms import FrameChoice

READ, REFUSED, CRASH, TIMEOUT, OTHER = "read", "refused", "crash", "timeout", "other exception"
GOOD = {READ, REFUSED}
FRAMES, HEIGHT, WIDTH = 24, 48, 64
CLIP_LENGTH = 8
CHOICE = FrameChoice(CLIP_LENGTH, "linspace", None)
HEADER_BYTES = 600

# File name -> encoder and its options. Short groups of pictures, so that decord can seek.
VIDEOS = {
    "h264.mp4": ("libx264", {"g": "2"}),
    "h264_b.mkv": ("libx264", {"g": "6", "bf": "2"}),
    "mpeg4.avi": ("mpeg4", {"g": "4", "bf": "2"}),
    "vp9.webm": ("libvpx-vp9", {"g": "2", "deadline": "realtime", "cpu-used": "8"}),
    "mpeg1.mpg": ("mpeg1video", {"g": "4", "bf": "2"}),
    "mpeg2.mpeg": ("mpeg2video", {"g": "4"}),
    "hevc.mp4": ("libx265", {"g": "2", "x265-params": "log-level=none:pools=none:frame-threads=1"}),
    "mjpeg.mov": ("mjpeg", {}),
}
IMAGES = {
    "baseline.jpg": {"quality": 90},
    "progressive.jpg": {"quality": 90, "progressive": True},
    "plain.png": {},
}


@dataclass(frozen=True)
class Ending:
    """The outcome of reading one mutant: its number, kind, outcome, message and duration in seconds."""

    number: int
    kind: str
    outcome: str
    detail: str
    seconds: float


# --- the mutants ------------------------------------------------------------------------------------------


def intact_files() -> dict[str, bytes]:
    """Returns one small intact file of each kind."""
    rng = np.random.default_rng(0)
    background = rng.integers(0, 128, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    frames = np.repeat(background[None], FRAMES, axis=0)
    for number, frame in enumerate(frames):
        frame[10:30, 2 * number : 2 * number + 12] = 255
    files = {name: _encode(frames, name, *how) for name, how in VIDEOS.items()}
    for name, options in IMAGES.items():
        buffer = io.BytesIO()
        Image.fromarray(frames[0]).save(buffer, format=Image.registered_extensions()[Path(name).suffix], **options)
        files[name] = buffer.getvalue()
    return files


def _encode(frames: np.ndarray, name: str, encoder: str, options: dict[str, str]) -> bytes:
    """Writes the frames, uint8 [T, H, W, 3], as a video file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        header_first = {"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {}
        with av.open(str(path), "w", options=header_first) as container:
            stream = container.add_stream(encoder, rate=25, options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
            stream.codec_context.thread_count = 1
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        return path.read_bytes()


def mutant(files: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """Returns mutant `number`: the kind of file it was made from, and its content."""
    rng = np.random.default_rng([seed, number])
    kind = list(files)[number % len(files)]
    content = bytearray(files[kind])
    for _ in range(int(rng.choice([1, 1, 1, 2, 4]))):
        change = CHANGES[int(rng.integers(len(CHANGES)))]
        content = change(content, rng) if content else content
    return kind, bytes(content)


def _flip_bits(content: bytearray, rng: np.random.Generator) -> bytearray:
    for position in rng.integers(len(content), size=int(rng.choice([1, 4, 32, 256]))):
        content[position] ^= 1 << int(rng.integers(8))
    return content


def _damage_header(content: bytearray, rng: np.random.Generator) -> bytearray:
    for position in rng.integers(min(len(content), HEADER_BYTES), size=int(rng.choice([1, 2, 8]))):
        content[position] = int(rng.integers(256))
    return content


def _put_extreme_number(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Overwrites two or four bytes with a number that programs stumble over; half of them in the header."""
    number = int(rng.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 100_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
    code = str(rng.choice([">I", "<I", ">H", "<H"]))
    piece = struct.pack(code, number & (0xFFFF if code.endswith("H") else 0xFFFFFFFF))
    reach = len(content) if rng.random() < 0.5 else min(len(content), HEADER_BYTES)
    position = int(rng.integers(reach))
    content[position : position + len(piece)] = piece
    return content


def _damage_table(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Puts an extreme number behind the four-letter name of a part, where containers have counts and sizes."""
    names = [match.end() for match in re.finditer(rb"[a-zA-Z]{4}", content[: 8 * HEADER_BYTES])]
    if not names:
        return content
    position = names[int(rng.integers(len(names)))] + 4 * int(rng.integers(5))
    number = int(rng.choice([0, 2, 100, 100_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
    content[position : position + 4] = struct.pack(">I" if rng.random() < 0.7 else "<I", number)
    return content


def _truncate(content: bytearray, rng: np.random.Generator) -> bytearray:
    return content[: int(rng.integers(len(content)))]


def _delete(content: bytearray, rng: np.random.Generator) -> bytearray:
    start = int(rng.integers(len(content)))
    del content[start : start + int(rng.integers(1, 2000))]
    return content


def _repeat(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Inserts a piece of the file at another position."""
    start, place = (int(position) for position in rng.integers(len(content), size=2))
    content[place:place] = content[start : start + int(rng.integers(1, 2000))]
    return content


def _splice(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Overwrites a piece with another piece of the file."""
    start, place = (int(position) for position in rng.integers(len(content), size=2))
    piece = content[start : start + int(rng.integers(1, 500))]
    content[place : place + len(piece)] = piece
    return content


CHANGES: list[Callable[[bytearray, np.random.Generator], bytearray]] = [
    _flip_bits, _damage_header, _put_extreme_number, _damage_table, _truncate, _delete, _repeat, _splice
]  # fmt: skip


# --- the readers ------------------------------------------------------------------------------------------


def read_direct(path: Path) -> None:
    """Reads with each decoder in this process, which only this script does."""
    if not path.is_dir():
        video._read_with_decord(path, FRAMES, [0, 5, 23])
    video.probe(path)
    video.read_frames(path, CHOICE)


def read_isolated(path: Path) -> None:
    """Reads as the data sets do."""
    decoding.probe(path)
    frames, _ = decoding.read_frames(path, CHOICE)
    assert frames.shape[0] == CLIP_LENGTH
    assert frames.dtype == np.uint8


READERS = {"direct": read_direct, "isolated": read_isolated}


# --- the children -----------------------------------------------------------------------------------------


def _serve(connection: Connection, reader: str) -> None:
    """Reads paths until there are no more, and reports the outcome of each."""
    while (path := connection.recv()) is not None:
        try:
            READERS[reader](path)
            connection.send((READ, ""))
        except UserError as error:
            connection.send((REFUSED, str(error)))
        except BaseException as error:  # any error is counted
            connection.send((OTHER, f"{type(error).__name__}: {error}"))


@dataclass
class _Child:
    process: BaseProcess
    connection: Connection
    number: int = -1
    kind: str = ""
    started: float = 0.0


def _start_child(reader: str) -> _Child:
    context = multiprocessing.get_context("fork")  # everything is imported already, and no thread runs
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, reader))
    process.start()
    theirs.close()
    return _Child(process, ours)


def run(
    files: dict[str, bytes], numbers: range, seed: int, reader: str, limit: float, children: int, folder: Path
) -> Iterator[Ending]:
    """Reads mutants in children, with `limit` seconds for each; yields how each of them ended."""
    waiting = iter(numbers)
    processes = [_start_child(reader) for _ in range(children)]
    idle, busy = list(processes), []
    while True:
        while idle and (number := next(waiting, None)) is not None:
            child = idle.pop()
            child.kind, content = mutant(files, seed, number)
            child.number, child.started = number, time.monotonic()
            child.connection.send(write_mutant(folder, child.kind, number, content))
            busy.append(child)
        if not busy:
            break
        ready = wait([child.connection for child in busy], timeout=0.5)
        for child in list(busy):
            seconds = time.monotonic() - child.started
            if child.connection not in ready and seconds < limit:
                continue
            busy.remove(child)
            outcome, detail = _outcome(child, child.connection in ready)
            yield Ending(child.number, child.kind, outcome, detail, seconds)
            idle.append(child if outcome in (READ, REFUSED, OTHER) else _start_child(reader))
    for child in idle:
        child.connection.send(None)
        child.process.join()


def _outcome(child: _Child, answered: bool) -> tuple[str, str]:
    """Returns the message of a child, or how it ended."""
    if not answered:
        child.process.kill()
        child.process.join()
        return TIMEOUT, ""
    try:
        return child.connection.recv()
    except EOFError:
        child.process.join()
        return CRASH, f"exit code {child.process.exitcode}"


def write_mutant(folder: Path, kind: str, number: int, content: bytes) -> Path:
    """Writes a mutant as a video file or as the only image of a folder of frames; returns the path to read."""
    if kind in VIDEOS:
        path = folder / f"{number}_{kind}"
        path.write_bytes(content)
        return path
    path = folder / str(number)
    path.mkdir()
    (path / f"00001{Path(kind).suffix}").write_bytes(content)
    return path


def main() -> int:
    """Runs the mutants and prints a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, default="isolated")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for one mutant")
    parser.add_argument("--children", type=int, default=2)
    options = parser.parse_args()
    table: Counter[tuple[str, str]] = Counter()
    numbers = range(options.first, options.first + options.mutants)
    files = intact_files()
    video._decord()  # imported once, by the parent of all children
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for ending in run(files, numbers, options.seed, options.reader, options.limit, options.children, Path(folder)):
            table[ending.kind, ending.outcome] += 1
            slowest = max(slowest, ending.seconds)
            if ending.outcome not in GOOD or ending.seconds > 1:
                print(f"mutant {ending.number} ({ending.kind}): {ending.outcome} {ending.detail}", flush=True)
    outcomes = [READ, REFUSED, CRASH, TIMEOUT, OTHER]
    print(f"{'':16}" + "".join(f"{outcome:>16}" for outcome in outcomes))
    for kind in files:
        print(f"{kind:16}" + "".join(f"{table[kind, outcome]:16}" for outcome in outcomes))
    totals = [sum(table[kind, outcome] for kind in files) for outcome in outcomes]
    print(f"{'all':16}" + "".join(f"{total:16}" for total in totals))
    print(f"slowest: {slowest:.2f} s")
    return 0 if sum(totals[2:]) == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
