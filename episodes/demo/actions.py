"""The classes of the demo set in which class names matter: an object and its motion, such as "a star moving left".

Test and validation classes are new pairs of words that occur in the training classes. They form grids of objects and
motions, so that each has look-alikes: the same object in another motion, and another object in the same motion. Some
clips contain a distractor, another object in another motion. A single support clip with a distractor does not show
which of the two objects belongs to the class, but the name of the class does.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from episodes.demo.drawing import draw_clip
from episodes.demo.motions import MOTIONS, Track

OBJECTS = ("star", "disc", "triangle", "cross", "bar", "square", "ring", "diamond")
# The members of each line are time reversals of each other, or the same change in another direction.
ACTIONS = (
    *("move_left", "move_right", "move_up", "move_down"),
    *("grow", "shrink", "fade_in", "fade_out"),
    *("orbit_clockwise", "orbit_counterclockwise", "shake", "nod"),
    *("bounce", "leap"),
)
GRIDS = {
    "val": (("square", "ring", "diamond"), ("move_up", "move_down", "shrink", "shake")),
    "test": (("star", "disc", "triangle", "cross", "bar"), ("move_left", "move_right", "grow", "orbit_clockwise")),
}
LARGEST_TILT = 0.2  # radians; a square that turns further looks like a diamond

DISTRACTOR_SHARE = 0.5  # of the clips


def class_name(thing: str, action: str) -> str:
    """Returns the name of a class: `star_move_left`."""
    return f"{thing}_{action}"


PAIRS = {class_name(thing, action): (thing, action) for thing in OBJECTS for action in ACTIONS}
PROMPTS = {name: f"a {thing} {MOTIONS[action].prompt}" for name, (thing, action) in PAIRS.items()}


def _splits() -> dict[str, list[str]]:
    """Returns the classes of each split: the grids, and for training all other pairs."""
    unseen = {
        split: [class_name(thing, action) for thing in things for action in actions]
        for split, (things, actions) in GRIDS.items()
    }
    held_out = {name for names in unseen.values() for name in names}
    return {"train": [name for name in PAIRS if name not in held_out], **unseen}


SPLITS = _splits()


def draw_action(rng: np.random.Generator, name: str, frames: int, size: int) -> np.ndarray:
    """Draws one clip of a class: uint8 [T, H, W, 3], RGB; T is `frames`, H and W are `size`."""
    thing, action = PAIRS[name]
    tracks, names = [_track(rng, action, frames)], [thing]
    if rng.random() < DISTRACTOR_SHARE:
        other_thing = str(rng.choice([other for other in OBJECTS if other != thing]))
        other_action = str(rng.choice([other for other in ACTIONS if other != action]))
        tracks, names = [*tracks, _track(rng, other_action, frames)], [*names, other_thing]
    order = rng.permutation(len(tracks))  # which object is in front
    return draw_clip(rng, [tracks[i] for i in order], size, [names[i] for i in order])


def _track(rng: np.random.Generator, action: str, frames: int) -> Track:
    """Returns the track of an object that stays almost upright."""
    (track,) = MOTIONS[action].tracks(rng, frames)
    return replace(track, angle=np.full(frames, rng.uniform(-LARGEST_TILT, LARGEST_TILT)))
