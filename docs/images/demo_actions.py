"""Renders the example of docs/predict.md: my_actions/ with one clip of each of five demo classes, clip.mp4, long.mp4.

    python docs/images/demo_actions.py
    python docs/images/demo_actions.py FOLDER

They are clips of test classes, which the demo's checkpoint has not seen; `part`, in long.mp4, has no example.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from episodes.demo.render import render_clip, write_video
from run.command import run_command
from utils.files import raise_if_not_new

SEED = 0  # of `prepare.py demo`
CLASSES = ("approach", "meet", "orbit_clockwise", "recede", "spiral_in")
LONG = ("approach", "recede", "orbit_clockwise", "spiral_in", "meet", "part", "approach", "meet")


def main(folder: Path = Path()) -> None:
    """Writes the files into a folder.

    Raises:
        UserError: one of them exists.
    """
    support, clip, long = folder / "my_actions", folder / "clip.mp4", folder / "long.mp4"
    raise_if_not_new(support, clip, long)
    for name in CLASSES:
        (support / name).mkdir(parents=True)
        write_video(support / name / "1.mp4", render_clip(name, SEED, 0))
    write_video(clip, render_clip("spiral_in", SEED, 9))
    parts = [render_clip(name, SEED, 6 + position % 6) for position, name in enumerate(LONG)]
    write_video(long, np.concatenate(parts))
    print(f"written: {support}, {clip}, {long}")


if __name__ == "__main__":
    run_command(lambda: main(*map(Path, sys.argv[1:2])))
