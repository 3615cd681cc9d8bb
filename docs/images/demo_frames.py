"""Draws demo.png: eight frames of one clip for some test classes of the demo. Needs `python run/prepare.py demo`."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from episodes.video import read_frames

CLASSES = ("move_up_right", "orbit_clockwise", "spiral_out", "meet")
FRAMES, SIDE, GAP, LABEL = 8, 88, 4, 190


def main(videos: Path = ROOT / "data/demo/videos") -> None:
    """Writes the picture beside this file."""
    width, height = LABEL + FRAMES * (SIDE + GAP), len(CLASSES) * (SIDE + GAP)
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    for row, name in enumerate(CLASSES):
        top = row * (SIDE + GAP)
        draw.text((4, top + SIDE // 2), name.replace("_", " "), fill="black", font=font, anchor="lm")
        clip = min((videos / name).iterdir())
        frames = read_frames(clip, lambda count: [round(i) for i in np.linspace(0, count - 1, FRAMES)])
        for column, frame in enumerate(frames):
            picture.paste(Image.fromarray(frame).resize((SIDE, SIDE)), (LABEL + column * (SIDE + GAP), top))
    picture.save(Path(__file__).with_name("demo.png"), optimize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
