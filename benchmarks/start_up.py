"""Measures the time from the command to the first training step, at the first and at the second start.

Writes a packed store of many small videos and starts the command twice on it, the first time with an empty cache. Each
start ends at its first training step. Times are processor times of the command and of the processes that it starts.

python benchmarks/start_up.py
python benchmarks/start_up.py --backbone ViT-B/16 --videos 2000
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import yaml
from PIL import Image

from benchmarks.machine import machine
from episodes.packed import write_packed
from episodes.splits import SPLITS
from run.command import run_command
from utils.files import CACHE_VARIABLE

SHARES = {"train": 31, "val": 10, "test": 10}  # classes, as in HMDB51's split
FRAMES, SIZE = 8, 32  # frames of a video, pixels
# Ends the command at its first step, and prints the processor time since its start.
COMMAND = """
import os, sys
sys.path.insert(0, {root!r})
from run.start import start
start()
from run import run, training_step
def stop(*_):
    print(sum(os.times()[:4]), flush=True)
    os._exit(0)
training_step.TrainingStep.__call__ = stop
run.main(sys.argv[1:])
"""


def write_data(folder: Path, videos: int) -> None:
    """Writes packed stores of `videos` videos of the same frames, and their split."""
    frames = []
    for number in range(FRAMES):
        noise = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(noise).save(content, "JPEG")
        frames.append(folder / f"{number}.jpg")
        frames[-1].write_bytes(content.getvalue())
    each = max(1, videos // sum(SHARES.values()))
    content: dict[str, object] = {"dataset": "start", "videos": "all", "horizontal_flip": True}
    for split in SPLITS:
        names = [f"{split}_{number}" for number in range(SHARES[split])]
        content[split] = [{"folder": name, "prompt": f"{name} action", "videos": each} for name in names]
        write_packed(
            folder / f"{split}.sqlite", [(f"{name}/{video}", frames) for name in names for video in range(each)]
        )
    (folder / "classes.yaml").write_text(yaml.safe_dump(content))


def seconds_to_first_step(folder: Path, run: str, options: argparse.Namespace) -> float:
    """Returns the processor time of one start."""
    words = [
        "--cfg", options.config, f"MODEL.BACKBONE={options.backbone}", "MODEL.CLIP_WEIGHTS=random",
        "DATA.DATASET=start", f"DATA.DATA_DIR={folder}", f"DATA.SPLIT_DIR={folder}", "DATA.NUM_WORKERS=0",
        "TRAIN.SHOT=1", "TRAIN.QUERY_PER_CLASS=1", "DEVICE.DEVICE=cpu", f"CHECKPOINT.CHECKPOINT_DIR={folder / run}",
        f"DATA.IMG_SIZE={options.image_size}", f"DATA.SHORT_SIDE={options.image_size}",
        *options.overrides,
    ]  # fmt: skip
    command = [sys.executable, "-c", COMMAND.format(root=str(ROOT)), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", CACHE_VARIABLE: str(folder / "cache")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return float(result.stdout.split()[-1])


def main() -> None:
    """Measures and prints both starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/clipspm/hmdb51.yaml")
    parser.add_argument("--backbone", default="RN50")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--videos", type=int, default=10000)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the config")
    options = parser.parse_args()
    print(f"{options.config}, {options.backbone}, {options.videos:,} videos in packed stores, random weights")
    print(*options.overrides)
    print(machine(uses_gpu=False))
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name), options.videos)
        for run in ("first", "second"):
            seconds = seconds_to_first_step(Path(name), run, options)
            print(f"{run} start: {seconds:.1f} s of processor time to the first step", flush=True)


if __name__ == "__main__":
    run_command(main)
