"""The motion classes of the demo set: objects that move, grow, turn or fade over one clip.

Lengths are fractions of the frame's side, the origin is the top left corner, y points down and angles are in
radians, clockwise on the screen. A motion is a function of a random generator and the number of frames; it
returns one `Track` per object.

Place, reach, size, angle and speed are random in every clip, so classes differ only in how things change over time. The
two members of a pair in `REVERSED_PAIRS` are exact time reversals of each other: one is computed by running the other
backwards. Their single frames and their average frames have the same distribution; only the order of the frames
distinguishes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np


@dataclass(frozen=True)
class Track:
    """The track of one object over a clip; every field is float64 [T]."""

    x: np.ndarray
    y: np.ndarray
    size: np.ndarray  # diameter
    angle: np.ndarray
    opacity: np.ndarray  # 0 is invisible, 1 is solid


@dataclass(frozen=True)
class Motion:
    """A class of the demo set: its words for the text tower, and the function that draws its tracks."""

    prompt: str
    tracks: Callable[[np.random.Generator, int], list[Track]]


def _track(
    rng: np.random.Generator,
    x: np.ndarray | float,
    y: np.ndarray | float,
    size: np.ndarray | float | None = None,
    angle: np.ndarray | float | None = None,
    opacity: np.ndarray | float = 1.0,
) -> Track:
    """Returns the track of an object; each value is a number or float64 [T], at least one of them an array.

    Size and angle are random by default.
    """
    if size is None:
        size = rng.uniform(0.22, 0.34)
    if angle is None:
        angle = rng.uniform(-np.pi, np.pi)
    return Track(*np.broadcast_arrays(x, y, size, angle, opacity))


def _progress(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Returns the share of the motion that is done at each frame, 0 to 1, float64 [T]; the speed is random."""
    start, end = rng.uniform(0.0, 0.1), rng.uniform(0.9, 1.0)
    return np.clip((np.linspace(0.0, 1.0, frames) - start) / (end - start), 0.0, 1.0)


def _centre(rng: np.random.Generator, spread: float = 0.06) -> tuple[float, float]:
    """Draws a random place (x, y) at most `spread` from the middle of the frame in each direction."""
    return 0.5 + rng.uniform(-spread, spread), 0.5 + rng.uniform(-spread, spread)


def _triangle_wave(phase: np.ndarray) -> np.ndarray:
    """Returns a triangle wave of period 1 between -1 and 1 that rises from 0: float64 [T] -> float64 [T]."""
    return 2.0 * np.abs(2.0 * ((phase + 0.75) % 1.0) - 1.0) - 1.0


def _line(rng: np.random.Generator, frames: int, heading: float, power: float = 1.0) -> list[Track]:
    """Moves along a straight line; `heading` is in degrees, 0 to the right, 90 down.

    A `power` above 1 speeds up; its negative slows down in the same way.
    """
    progress = _progress(rng, frames)
    if power < 0:
        progress = 1.0 - (1.0 - progress) ** -power
    else:
        progress = progress**power
    direction = np.radians(heading + rng.uniform(-12.0, 12.0))
    along = (2.0 * progress - 1.0) * rng.uniform(0.28, 0.36)
    x, y = _centre(rng)
    return [_track(rng, x + along * np.cos(direction), y + along * np.sin(direction))]


def _grow(rng: np.random.Generator, frames: int) -> list[Track]:
    """Swells a small object in place."""
    progress = _progress(rng, frames)
    x, y = _centre(rng, 0.12)
    small, large = rng.uniform(0.1, 0.16), rng.uniform(0.5, 0.66)
    return [_track(rng, x, y, size=small + (large - small) * progress)]


def _pulse(rng: np.random.Generator, frames: int) -> list[Track]:
    """Swells an object and shrinks it back, in place."""
    progress = _progress(rng, frames)
    x, y = _centre(rng, 0.12)
    small, large = rng.uniform(0.12, 0.18), rng.uniform(0.5, 0.66)
    return [_track(rng, x, y, size=small + (large - small) * (1.0 - np.abs(2.0 * progress - 1.0)))]


def _approach(rng: np.random.Generator, frames: int) -> list[Track]:
    """Brings an object closer: small at the top of the frame, large at the bottom."""
    progress = _progress(rng, frames)
    x, y = _centre(rng)
    small, large = rng.uniform(0.1, 0.16), rng.uniform(0.42, 0.54)
    y_path = y + (2.0 * progress - 1.0) * rng.uniform(0.24, 0.3)
    return [_track(rng, x + 0.0 * progress, y_path, size=small + (large - small) * progress)]


def _rotate(rng: np.random.Generator, frames: int) -> list[Track]:
    """Turns a large object about once, clockwise, in place; it starts roughly upright."""
    progress = _progress(rng, frames)
    x, y = _centre(rng)
    angle = rng.uniform(-0.5, 0.5) + 2.0 * np.pi * rng.uniform(0.9, 1.1) * progress
    return [_track(rng, x, y, size=rng.uniform(0.42, 0.56), angle=angle)]


def _fade_in(rng: np.random.Generator, frames: int) -> list[Track]:
    """Fades an object in from nothing."""
    x, y = _centre(rng, 0.15)
    return [_track(rng, x, y, size=rng.uniform(0.3, 0.44), opacity=_progress(rng, frames))]


def _blink(rng: np.random.Generator, frames: int) -> list[Track]:
    """Shows and hides an object three times."""
    x, y = _centre(rng, 0.15)
    cycles = rng.uniform(2.7, 3.3) * np.linspace(0.0, 1.0, frames) + rng.uniform(0.0, 0.2)
    return [_track(rng, x, y, size=rng.uniform(0.3, 0.44), opacity=(cycles % 1.0 < 0.5).astype(np.float64))]


def _arc(rng: np.random.Generator, frames: int) -> list[Track]:
    """Moves along half a circle over the top, from left to right."""
    progress = _progress(rng, frames)
    x, y = _centre(rng, 0.05)
    radius = rng.uniform(0.28, 0.35)
    phase = np.pi * (1.0 + progress) + rng.uniform(-0.2, 0.2)
    return [_track(rng, x + radius * np.cos(phase), y + 0.5 * radius + radius * np.sin(phase))]


def _orbit(rng: np.random.Generator, frames: int) -> list[Track]:
    """Moves along about one circle around the middle, clockwise from the top."""
    progress = _progress(rng, frames)
    x, y = _centre(rng)
    radius = rng.uniform(0.26, 0.34)
    phase = -0.5 * np.pi + rng.uniform(-0.4, 0.4) + 2.0 * np.pi * rng.uniform(0.9, 1.1) * progress
    return [_track(rng, x + radius * np.cos(phase), y + radius * np.sin(phase))]


def _spiral_in(rng: np.random.Generator, frames: int) -> list[Track]:
    """Moves from the top of the frame clockwise into the middle."""
    progress = _progress(rng, frames)
    x, y = _centre(rng)
    radius = rng.uniform(0.3, 0.38) * (1.0 - progress)
    phase = -0.5 * np.pi + rng.uniform(-0.4, 0.4) + 2.0 * np.pi * rng.uniform(1.15, 1.35) * progress
    return [_track(rng, x + radius * np.cos(phase), y + radius * np.sin(phase), size=rng.uniform(0.2, 0.28))]


def _figure_eight(rng: np.random.Generator, frames: int) -> list[Track]:
    """Moves along a horizontal eight, from the middle to the right."""
    phase = 2.0 * np.pi * _progress(rng, frames)
    x, y = _centre(rng)
    wide, high = rng.uniform(0.27, 0.34), rng.uniform(0.18, 0.26)
    return [_track(rng, x + wide * np.sin(phase), y + high * np.sin(2.0 * phase))]


def _zigzag(rng: np.random.Generator, frames: int, down: bool) -> list[Track]:
    """Moves across the frame to the right, or down, and swerves to both sides twice."""
    progress = _progress(rng, frames)
    along = (2.0 * progress - 1.0) * rng.uniform(0.28, 0.36)
    across = _triangle_wave(2.0 * progress) * rng.uniform(0.17, 0.24)
    x, y = _centre(rng)
    if down:
        along, across = across, along
    return [_track(rng, x + along, y + across, size=rng.uniform(0.2, 0.28))]


def _shake(rng: np.random.Generator, frames: int, vertical: bool) -> list[Track]:
    """Moves quickly back and forth around one place, three times."""
    progress = _progress(rng, frames)
    swerve = np.sin(2.0 * np.pi * rng.uniform(2.8, 3.2) * progress) * rng.uniform(0.18, 0.26)
    x, y = _centre(rng)
    if vertical:
        return [_track(rng, x, y + swerve)]
    return [_track(rng, x + swerve, y)]


def _bounce(rng: np.random.Generator, frames: int) -> list[Track]:
    """Falls to the ground and rebounds twice, lower each time."""
    first, second = rng.uniform(0.45, 0.6), rng.uniform(0.2, 0.3)
    # In units of the time of the first fall from height 1; a rebound to height h lasts 2 sqrt(h).
    landing = 1.0 + 2.0 * np.sqrt(first)
    time = _progress(rng, frames) * (landing + 2.0 * np.sqrt(second))
    height = np.maximum.reduce(
        [
            1.0 - time**2,
            first - (time - 1.0 - np.sqrt(first)) ** 2,
            second - (time - landing - np.sqrt(second)) ** 2,
            np.zeros_like(time),
        ]
    )
    x, y = _centre(rng)
    return [_track(rng, x, y + 0.32 - rng.uniform(0.56, 0.66) * height)]


def _leap(rng: np.random.Generator, frames: int) -> list[Track]:
    """Jumps from the ground and back to the same place."""
    progress = _progress(rng, frames)
    x, y = _centre(rng)
    return [_track(rng, x, y + 0.3 - rng.uniform(0.52, 0.66) * 4.0 * progress * (1.0 - progress))]


def _swing(rng: np.random.Generator, frames: int) -> list[Track]:
    """Swings one and a half times like a pendulum, starting on the left."""
    swing = -np.cos(3.0 * np.pi * _progress(rng, frames)) * rng.uniform(0.7, 0.95)
    x, y = _centre(rng)
    length = rng.uniform(0.44, 0.54)
    return [_track(rng, x + length * np.sin(swing), y - 0.25 + length * np.cos(swing), angle=-swing)]


def _meet(rng: np.random.Generator, frames: int) -> list[Track]:
    """Moves two objects from the left and the right until they touch in the middle."""
    progress = _progress(rng, frames)
    near, far = rng.uniform(0.1, 0.13), rng.uniform(0.34, 0.4)
    tilt = rng.uniform(-0.25, 0.25)
    distance = far + (near - far) * progress
    x, y = _centre(rng)
    return [
        _track(
            rng,
            x + side * distance * np.cos(tilt),
            y + side * distance * np.sin(tilt),
            size=rng.uniform(0.2, 0.28),
        )
        for side in (-1.0, 1.0)
    ]


def _lanes(rng: np.random.Generator) -> tuple[float, float]:
    """Draws the heights of two separate horizontal lanes, in random order."""
    first = rng.choice([-1.0, 1.0]) * rng.uniform(0.15, 0.2)
    return 0.5 + first, 0.5 - first


def _overtake(rng: np.random.Generator, frames: int) -> list[Track]:
    """Moves two objects to the right in two lanes; the quick one passes the slow one."""
    progress = _progress(rng, frames)
    quick, slow = _lanes(rng)
    return [
        _track(rng, rng.uniform(0.4, 0.46) + 0.15 * progress, slow, size=rng.uniform(0.2, 0.28)),
        _track(rng, 0.14 + rng.uniform(0.66, 0.74) * progress, quick, size=rng.uniform(0.2, 0.28)),
    ]


def _swap(rng: np.random.Generator, frames: int) -> list[Track]:
    """Moves two objects past each other in opposite directions, in two lanes."""
    along = (2.0 * _progress(rng, frames) - 1.0) * rng.uniform(0.28, 0.36)
    first, second = _lanes(rng)
    return [
        _track(rng, 0.5 + along, first, size=rng.uniform(0.2, 0.28)),
        _track(rng, 0.5 - along, second, size=rng.uniform(0.2, 0.28)),
    ]


def _seesaw(rng: np.random.Generator, frames: int) -> list[Track]:
    """Raises the object on the left while the one on the right sinks."""
    along = (2.0 * _progress(rng, frames) - 1.0) * rng.uniform(0.26, 0.34)
    x, y = _centre(rng)
    apart = rng.uniform(0.18, 0.24)
    return [
        _track(rng, x - apart, y - along, size=rng.uniform(0.2, 0.28)),
        _track(rng, x + apart, y + along, size=rng.uniform(0.2, 0.28)),
    ]


def _chase(rng: np.random.Generator, frames: int) -> list[Track]:
    """Moves two objects, one behind the other, down the frame; the follower catches up."""
    progress = _progress(rng, frames)
    x, _ = _centre(rng)
    ahead = 0.45 + rng.uniform(0.36, 0.42) * progress
    gap = rng.uniform(0.34, 0.38) + (rng.uniform(0.2, 0.24) - 0.36) * progress
    return [
        _track(rng, x, ahead, size=rng.uniform(0.2, 0.26)),
        _track(rng, x, ahead - gap, size=rng.uniform(0.2, 0.26)),
    ]


def _backwards(
    tracks: Callable[[np.random.Generator, int], list[Track]],
) -> Callable[[np.random.Generator, int], list[Track]]:
    """Reverses a motion in time: the same random tracks, played from the last frame to the first."""

    def reversed_tracks(rng: np.random.Generator, frames: int) -> list[Track]:
        return [Track(t.x[::-1], t.y[::-1], t.size[::-1], t.angle[::-1], t.opacity[::-1]) for t in tracks(rng, frames)]

    return reversed_tracks


MOTIONS: dict[str, Motion] = {
    "move_left": Motion("moving left", partial(_line, heading=180.0)),
    "move_right": Motion("moving right", partial(_line, heading=0.0)),
    "move_up": Motion("moving up", partial(_line, heading=-90.0)),
    "move_down": Motion("moving down", partial(_line, heading=90.0)),
    "move_up_left": Motion("moving up and left", partial(_line, heading=-135.0)),
    "move_down_right": Motion("moving down and right", partial(_line, heading=45.0)),
    "move_up_right": Motion("moving up and right", partial(_line, heading=-45.0)),
    "move_down_left": Motion("moving down and left", _backwards(partial(_line, heading=-45.0))),
    "speed_up": Motion("speeding up to the right", partial(_line, heading=0.0, power=3.0)),
    "slow_down": Motion("slowing down to the right", partial(_line, heading=0.0, power=-3.0)),
    "grow": Motion("growing", _grow),
    "shrink": Motion("shrinking", _backwards(_grow)),
    "pulse": Motion("growing and shrinking back", _pulse),
    "approach": Motion("coming closer", _approach),
    "recede": Motion("going away into the distance", _backwards(_approach)),
    "rotate_clockwise": Motion("turning clockwise on the spot", _rotate),
    "rotate_counterclockwise": Motion("turning counterclockwise on the spot", _backwards(_rotate)),
    "fade_in": Motion("appearing slowly", _fade_in),
    "fade_out": Motion("disappearing slowly", _backwards(_fade_in)),
    "blink": Motion("blinking", _blink),
    "arc_right": Motion("flying over to the right", _arc),
    "arc_left": Motion("flying over to the left", _backwards(_arc)),
    "orbit_clockwise": Motion("circling clockwise", _orbit),
    "orbit_counterclockwise": Motion("circling counterclockwise", _backwards(_orbit)),
    "spiral_in": Motion("spiralling inwards", _spiral_in),
    "spiral_out": Motion("spiralling outwards", _backwards(_spiral_in)),
    "figure_eight": Motion("flying a figure eight", _figure_eight),
    "zigzag_right": Motion("zigzagging to the right", partial(_zigzag, down=False)),
    "zigzag_down": Motion("zigzagging downwards", partial(_zigzag, down=True)),
    "shake": Motion("shaking sideways", partial(_shake, vertical=False)),
    "nod": Motion("shaking up and down", partial(_shake, vertical=True)),
    "bounce": Motion("falling and bouncing", _bounce),
    "leap": Motion("leaping up and landing", _leap),
    "swing": Motion("swinging like a pendulum", _swing),
    "meet": Motion("two things meeting", _meet),
    "part": Motion("two things parting", _backwards(_meet)),
    "overtake": Motion("one thing overtaking another", _overtake),
    "swap": Motion("two things passing each other", _swap),
    "seesaw": Motion("one thing rising while another sinks", _seesaw),
    "chase": Motion("one thing chasing another", _chase),
}

# Every unseen motion consists of changes that the training motions contain: places, sizes, arcs, two objects.
SPLITS: dict[str, list[str]] = {
    "train": [
        "move_left",
        "move_right",
        "move_up",
        "move_down",
        "move_up_left",
        "move_down_right",
        "speed_up",
        "slow_down",
        "grow",
        "shrink",
        "rotate_clockwise",
        "rotate_counterclockwise",
        "fade_in",
        "fade_out",
        "blink",
        "arc_left",
        "arc_right",
        "zigzag_right",
        "shake",
        "bounce",
        "leap",
        "overtake",
        "seesaw",
        "chase",
    ],
    "val": ["pulse", "zigzag_down", "nod", "swing", "figure_eight", "swap"],
    "test": [
        "move_up_right",
        "move_down_left",
        "approach",
        "recede",
        "orbit_clockwise",
        "orbit_counterclockwise",
        "spiral_in",
        "spiral_out",
        "meet",
        "part",
    ],
}

REVERSED_PAIRS: list[tuple[str, str]] = [
    ("move_up_right", "move_down_left"),
    ("approach", "recede"),
    ("orbit_clockwise", "orbit_counterclockwise"),
    ("spiral_in", "spiral_out"),
    ("meet", "part"),
]
