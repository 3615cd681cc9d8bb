"""Time and space to prepare a data set: python benchmarks/preparation.py

Renders moving patches of colour with the codec, size and length of the benchmarks' videos, prepares them with
`run/prepare.py custom`, once as published and once with all frames, and prints seconds of processor time and megabytes
per 1,000 videos. A first preparation with one video per class measures the start-up time, which is subtracted. All
files are in a temporary folder, which is removed at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import argparse
import resource
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import av
import numpy as np
from PIL import Image

from benchmarks.machine import machine
from run.command import run_command

CLASSES = 10
PRESETS = ("_256x256q5_l8", "_short256q5_lall")
BLOBS, MARGIN = 16, 48  # patches of colour per side of the picture; pixels by which it is larger than a frame
SEED = 4


@dataclass(frozen=True)
class StandIn:
    """Videos like those of a data set: suffix, encoder and its options, (height, width), fewest and most frames."""

    like: str
    suffix: str
    encoder: str
    options: dict[str, str]
    size: tuple[int, int]
    frames: tuple[int, int]

    def __str__(self) -> str:
        height, width = self.size
        low, high = self.frames
        return f"{width} x {height}, {self.encoder}, {low if low == high else f'{low} to {high}'} frames"


STAND_INS = (
    StandIn("HMDB51, UCF101", ".avi", "mpeg4", {"b": "500k"}, (240, 320), (65, 288)),
    StandIn("Kinetics", ".mp4", "libx264", {"crf": "23"}, (256, 340), (300, 300)),
    StandIn(
        "Something-Something V2", ".webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "b": "500k"},
        (240, 427), (48, 48),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """The cost of a preparation: seconds of processor time, bytes of packed stores and of JPEG files."""

    seconds: float
    packed: int
    files: int


def render(path: Path, kind: StandIn, rng: np.random.Generator) -> None:
    """Writes a video of a moving picture."""
    height, width = kind.size
    coarse = Image.fromarray(rng.integers(0, 256, (BLOBS, BLOBS, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((width + MARGIN, height + MARGIN), Image.Resampling.BICUBIC))
    number, phase = int(rng.integers(*kind.frames, endpoint=True)), rng.random(2) * 2 * np.pi
    with av.open(str(path), "w") as container:
        stream = container.add_stream(kind.encoder, rate=25, options=kind.options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for time in range(number):
            top, left = (MARGIN / 2 * (1 + np.sin(0.1 * time + phase))).astype(int)
            shown = np.ascontiguousarray(picture[top : top + height, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode())


def prepare(videos: Path, out: Path, preset: str) -> Cost:
    """Prepares a folder of class folders with one process."""
    command = [
        sys.executable, "run/prepare.py", "custom", "--videos", videos, "--out", out, "--ratios", "0.6", "0.2", "0.2",
        "--preset", preset, "--workers", "1",
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds, _bytes_in(out / "packed"), _bytes_in(out / "frames"))


def measure(kind: StandIn, videos: int, folder: Path) -> str:
    """Returns a row of the table."""
    rng = np.random.default_rng(SEED)
    few, many = folder / "few", folder / "many"
    for number in range(videos + CLASSES):
        root = few if number < CLASSES else many
        path = root / f"class_{number % CLASSES}" / f"video_{number}{kind.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        render(path, kind, rng)
    cells = [kind.like, str(kind), f"{_bytes_in(many) / videos / 1e3:.0f}"]
    for preset in PRESETS:
        start = prepare(few, folder / f"few{preset}", preset)
        cost = prepare(many, folder / f"many{preset}", preset)
        # With n more videos of this kind, seconds = start + n * each.
        each = (cost.seconds - start.seconds) / (videos - CLASSES)
        cells += [f"{1000 * each:.0f}", f"{cost.packed / videos / 1e3:.0f}", f"{cost.files / videos / 1e3:.0f}"]
    return f"| {' | '.join(cells)} |"


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=100, help="of each kind, more than 10 (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.videos <= CLASSES:
        parser.error(f"--videos {options.videos}: expected more than {CLASSES}")
    columns = [f"{preset}: {what}" for preset in PRESETS for what in ("s", "MB packed", "MB files")]
    print(f"Per 1,000 videos, measured on {options.videos} of each kind. Machine: {machine()}.\n")
    print(f"| stand-in for | video | kB per video | {' | '.join(columns)} |")
    print(f"|{'---|' * (3 + len(columns))}")
    for kind in STAND_INS:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(kind, options.videos, Path(folder)), flush=True)


if __name__ == "__main__":
    run_command(main)
