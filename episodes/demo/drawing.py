"""Draws the demo set: coloured, textured shapes on a still background, whole clips at a time.

Pictures are float32 with values 0 to 1, and the colour is the last axis. An object and its background are
drawn from opposite ends of the brightness scale, so that the object is visible in every clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from episodes.demo.motions import Track


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """Returns the signed distance from an upright box around the origin, in the shape of u and v."""
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns the signed distance from a triangle that points up."""
    return np.maximum(v - 0.7, 0.87 * np.abs(u) - 0.5 * v - 0.48)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns roughly the signed distance from a star with five round points."""
    return np.hypot(u, v) - 0.72 - 0.26 * np.cos(5.0 * np.arctan2(u, -v))


# Each function returns the signed distance from the shape's edge, negative inside, at points (u, v) in arrays of any
# shape. The unit is the object's radius; the shape reaches about 1 from its centre.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: np.hypot(u, v) - 0.95,
    "square": lambda u, v: _box(u, v, 0.8, 0.8),
    "diamond": lambda u, v: 0.71 * (np.abs(u) + np.abs(v) - 1.05),
    "triangle": _triangle,
    "star": _star,
    "cross": lambda u, v: np.minimum(_box(u, v, 0.95, 0.38), _box(u, v, 0.38, 0.95)),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.68) - 0.3,
    "bar": lambda u, v: _box(u, v, 0.5, 1.0),
    "corner": lambda u, v: np.minimum(_box(u + 0.45, v, 0.38, 0.85), _box(u, v - 0.48, 0.83, 0.38)),
}


def _colour(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """Draws a random colour with a brightness between low and high, float32 [3]."""
    hue = rng.uniform(0.0, 1.0, 3)
    hue -= hue @ np.array([0.299, 0.587, 0.114])
    # Only as much tint as fits into 0 to 1 at this brightness, since clipping would change the brightness.
    brightness = rng.uniform(low, high)
    room = np.where(hue > 0, 1.0 - brightness, brightness) / np.maximum(np.abs(hue), 1e-6)
    return (brightness + hue * min(1.0, room.min())).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draws soft blotches, values 0 to 1, float32 [H, W]: a coarse random grid, interpolated."""
    knots = rng.uniform(0.0, 1.0, (5, 5))
    place = np.linspace(0.0, 4.0, size)
    weight = np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(5)[None, :]))  # [H, 5]
    return (weight @ knots @ weight.T).astype(np.float32)


def draw_background(rng: np.random.Generator, size: int, low: float, high: float) -> np.ndarray:
    """Draws a flat, graded, blotchy, striped or chequered picture of two colours, float32 [H, W, 3]."""
    first, second = _colour(rng, low, high), _colour(rng, low, high)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    direction = rng.uniform(0.0, np.pi)
    along = x * np.cos(direction) + y * np.sin(direction)
    across = y * np.cos(direction) - x * np.sin(direction)
    waves = rng.uniform(2.0, 5.0)
    kind = rng.choice(["flat", "gradient", "noise", "stripes", "checks"])
    if kind == "flat":
        mix = np.zeros_like(x)
    elif kind == "gradient":
        mix = (along - along.min()) / (along.max() - along.min())
    elif kind == "noise":
        mix = _smooth_noise(rng, size)
    elif kind == "stripes":
        mix = 0.5 + 0.5 * np.clip(3.0 * np.sin(2.0 * np.pi * waves * along), -1.0, 1.0)
    else:
        wave = np.sin(2.0 * np.pi * waves * along) * np.sin(2.0 * np.pi * waves * across)
        mix = 0.5 + 0.5 * np.clip(4.0 * wave, -1.0, 1.0)
    return (first + (second - first) * mix[..., None]).astype(np.float32)


def _second_colour(kind: str, u: np.ndarray, v: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Returns the share of the object's second colour at each point, 0 to 1, in the shape of u and v."""
    if kind == "half":
        edge = v
    elif kind == "quarter":
        edge = np.maximum(u, v)
    else:
        edge = np.abs((2.0 * v) % 1.0 - 0.5) - 0.25
    return np.clip(0.5 - edge * pixels, 0.0, 1.0)


def draw_object(
    rng: np.random.Generator,
    frames: np.ndarray,
    track: Track,
    low: float,
    high: float,
    turns: bool = False,
    name: str | None = None,
) -> None:
    """Paints one object over every frame, in place.

    Args:
        rng: the random generator.
        frames: float32 [T, H, W, 3], values 0 to 1.
        track: where the object is in each of the T frames.
        low, high: bounds of the brightness of its colours.
        turns: whether the object turns, so that it needs a texture that looks different after half a turn.
        name: one of `SHAPES`; by default a random one.
    """
    side = frames.shape[1]
    shape = SHAPES[rng.choice(list(SHAPES)) if name is None else name]
    texture = rng.choice(["half", "quarter"] if turns else ["half", "quarter", "stripes"])
    # The two colours differ in brightness, so that the texture, and with it a turn, can be seen.
    third = (high - low) / 3.0
    bounds = [(low, low + third), (high - third, high)]
    first, second = (_colour(rng, *bounds[i]) for i in rng.permutation(2))

    radius = (0.5 * side * track.size).astype(np.float32)
    pixels = radius[:, None, None]  # one unit of (u, v) in pixels, [T, 1, 1]
    place = np.arange(side, dtype=np.float32) + 0.5
    dx = (place[None, :] - (side * track.x[:, None]).astype(np.float32)) / radius[:, None]  # [T, W]
    dy = (place[None, :] - (side * track.y[:, None]).astype(np.float32)) / radius[:, None]  # [T, H]
    cos = np.cos(track.angle).astype(np.float32)[:, None]
    sin = np.sin(track.angle).astype(np.float32)[:, None]
    # The axes of the object at each pixel: the screen's axes, turned back by the object's angle; [T, H, W].
    u = (dx * cos)[:, None, :] + (dy * sin)[:, :, None]
    v = (dy * cos)[:, :, None] - (dx * sin)[:, None, :]

    cover = np.clip(0.5 - shape(u, v) * pixels, 0.0, 1.0)
    cover *= track.opacity.astype(np.float32)[:, None, None]
    mix = _second_colour(texture, u, v, pixels)
    colour = first + (second - first) * mix[..., None]
    frames += (colour - frames) * cover[..., None]


def draw_clip(
    rng: np.random.Generator, tracks: list[Track], size: int, names: Sequence[str | None] | None = None
) -> np.ndarray:
    """Draws one clip: a still background and one object per track, uint8 [T, H, W, 3].

    Args:
        rng: the random generator.
        tracks: the track of each object; a later one is drawn over an earlier one.
        size: H and W.
        names: the shape of each object, one of `SHAPES`; by default random ones.
    """
    # The object has the wider range, since its texture needs contrast too.
    if rng.random() < 0.5:
        behind, before = (0.04, 0.3), (0.54, 0.97)
    else:
        behind, before = (0.7, 0.96), (0.03, 0.46)
    background = draw_background(rng, size, *behind)
    frames = np.repeat(background[None], len(tracks[0].x), axis=0)
    for track, name in zip(tracks, names or len(tracks) * [None], strict=True):
        draw_object(rng, frames, track, *before, turns=bool(np.ptp(track.angle) > 0), name=name)
    return np.clip(np.rint(frames * 255.0), 0, 255).astype(np.uint8)
