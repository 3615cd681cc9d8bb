"""Draws single frames with captions, from which `run/pretrain_demo.py` trains a small CLIP.

A frame shows one or two objects of the second demo set (`actions.py`), at any place and in any size. Its caption names
them and, often, their place or size: "a star at the top left", "a large ring and a small bar". Captions have no words
for motions, since a single frame does not show motion.
"""

from __future__ import annotations

import numpy as np

from episodes.demo.actions import LARGEST_TILT, OBJECTS
from episodes.demo.drawing import draw_clip
from episodes.demo.motions import Track

TWO_OBJECTS = 0.5  # share of the frames
PLACE_NAMED, SIZE_NAMED = 0.6, 0.3  # share of the objects
LEFT, RIGHT = 0.38, 0.62  # of the frame's width or height
SMALL, LARGE = 0.17, 0.36  # diameters, of the frame's side


def captioned_frame(seed: int, number: int, size: int = 72) -> tuple[np.ndarray, str]:
    """Draws a frame and its caption, a pure function of the arguments: uint8 [size, size, 3], RGB, and words."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
    count = 2 if rng.random() < TWO_OBJECTS else 1
    names = [str(name) for name in rng.choice(OBJECTS, count, replace=False)]
    tracks = [_still(rng) for _ in names]
    frame = draw_clip(rng, tracks, size, names)[0]
    phrases = [_phrase(rng, name, track) for name, track in zip(names, tracks, strict=True)]
    return frame, " and ".join(phrases[i] for i in rng.permutation(count))


def _still(rng: np.random.Generator) -> Track:
    """Returns a single moment of an object, every field float64 [1]."""
    diameter = np.exp(rng.uniform(np.log(0.1), np.log(0.6)))
    margin = 0.12 + 0.15 * diameter
    x, y = rng.uniform(margin, 1.0 - margin, 2)
    moment = (x, y, diameter, rng.uniform(-LARGEST_TILT, LARGEST_TILT), rng.uniform(0.5, 1.0))
    return Track(*(np.array([value]) for value in moment))


def _phrase(rng: np.random.Generator, name: str, track: Track) -> str:
    """Returns a noun phrase for one object: "a star", "a small star at the bottom right"."""
    x, y, diameter = track.x[0], track.y[0], track.size[0]
    size = "small " if diameter < SMALL else "large " if diameter > LARGE else ""
    row = "top" if y < LEFT else "bottom" if y > RIGHT else ""
    column = "left" if x < LEFT else "right" if x > RIGHT else ""
    words = f"a {size if rng.random() < SIZE_NAMED else ''}{name}"
    if rng.random() >= PLACE_NAMED:
        return words
    return f"{words} at the {' '.join([row, column]).strip()}" if row or column else f"{words} in the middle"
