"""The world of the reference pipelines: scenes of one or two objects, and their renderer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimdiff.reference.pixels import SIDE

Floats = NDArray[np.float32]

SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 230, 50),
    "green": (45, 190, 60),
    "cyan": (60, 215, 230),
    "blue": (50, 95, 245),
    "purple": (170, 60, 220),
    "white": (240, 240, 240),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "charcoal": (46, 46, 50),
    "navy": (16, 24, 88),
    "maroon": (88, 16, 28),
    "forest": (14, 72, 38),
}
SIZES: dict[str, float] = {"small": 7.0, "large": 12.0}
"""Nominal radius of each size in pixels."""

POSITIONS: dict[str, tuple[float, float]] = {
    "top left": (16.0, 16.0),
    "top right": (48.0, 16.0),
    "bottom left": (16.0, 48.0),
    "bottom right": (48.0, 48.0),
}
"""Nominal centre (x, y) of each position in pixels."""

SHIFT_JITTER = 2.0
RADIUS_JITTER = 0.06
OBJECT_BRIGHTNESS = (0.9, 1.05)
BACKGROUND_BRIGHTNESS = (0.9, 1.1)
LIGHT_STRENGTH = (0.05, 0.2)


@dataclass(frozen=True)
class Object:
    """One object of a scene, by its words."""

    size: str
    colour: str
    shape: str
    position: str


@dataclass(frozen=True)
class Scene:
    """A background and the objects on it, in the order in which a caption names them."""

    objects: tuple[Object, ...]
    background: str

    def canonical(self) -> Scene:
        """The same scene with its objects in a fixed order."""
        return Scene(tuple(sorted(self.objects, key=lambda o: o.position)), self.background)


def distance(shape: str, x: Floats, y: Floats, radius: Floats) -> Floats:
    """Approximate signed distance to `shape`, negative inside; all in pixels from its centre."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius
    if shape == "square":
        return _box(x, y, 0.92 * radius, 0.92 * radius)
    if shape == "bar":
        return _box(x, y, radius, 0.36 * radius)
    if shape == "cross":
        long, thin = radius, 0.3 * radius
        return np.minimum(_box(x, y, long, thin), _box(x, y, thin, long))
    if shape == "triangle":
        return _triangle(x, y, radius)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def _box(x: Floats, y: Floats, half_width: Floats, half_height: Floats) -> Floats:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _triangle(x: Floats, y: Floats, radius: Floats) -> Floats:
    """Isosceles, apex up, as wide as it is high: 2 radii less a little at the base."""
    slope = np.float32(0.8944)  # 2 / sqrt(5): sides rise 2 for 1
    sides = np.abs(x) * slope - (y + radius) * np.float32(0.4472)
    return np.maximum(sides, y - 0.85 * radius)


def coverage(shape: str, x: Floats, y: Floats, radius: Floats) -> Floats:
    """Share of each pixel that `shape` covers, 0 to 1 (antialiased over one pixel)."""
    return np.clip(0.5 - distance(shape, x, y, radius), 0.0, 1.0)


def grid() -> tuple[Floats, Floats]:
    """Pixel centres: x of shape (1, 1, SIDE) and y of shape (1, SIDE, 1), in pixels."""
    line = np.arange(SIDE, dtype=np.float32) + 0.5
    return line[None, None, :], line[None, :, None]


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Floats:
    return rng.uniform(low, high, shape).astype(np.float32)


def _light(n: int, rng: np.random.Generator) -> Floats:
    """A linear brightness ramp around 1 for each of n images: (n, SIDE, SIDE)."""
    x, y = grid()
    angle = _uniform(rng, 0, 2 * np.pi, n, 1, 1)
    ramp = (np.cos(angle) * (x - SIDE / 2) + np.sin(angle) * (y - SIDE / 2)) / (SIDE / 2)
    return 1 + _uniform(rng, *LIGHT_STRENGTH, n, 1, 1) * ramp


def render_batch(scenes: Sequence[Scene], rng: np.random.Generator) -> Floats:
    """Render `scenes`, jittered by `rng`: (n, SIDE, SIDE, 3), values from 0 to 1."""
    n = len(scenes)
    light = _light(n, rng)
    brightness = _uniform(rng, *BACKGROUND_BRIGHTNESS, n, 1)
    base = np.array([BACKGROUNDS[s.background] for s in scenes], np.float32) * brightness
    images = base[:, None, None, :] * light[..., None]
    owners = [(i, o) for i, scene in enumerate(scenes) for o in scene.objects]
    jitter = _uniform(rng, -1, 1, len(owners), 4)
    for shape in SHAPES:
        picked = [k for k, (_, o) in enumerate(owners) if o.shape == shape]
        for half in (0, 1):  # an image may own two objects of one shape: paint them apart
            chosen = [k for k in picked if _ordinal(owners, k) == half]
            if chosen:
                _paint(images, shape, [owners[k] for k in chosen], jitter[chosen], light)
    return np.clip(images / 255, 0, 1)


def _ordinal(owners: Sequence[tuple[int, Object]], k: int) -> int:
    return int(k > 0 and owners[k - 1][0] == owners[k][0])


def _paint(
    images: Floats,
    shape: str,
    owned: Sequence[tuple[int, Object]],
    jitter: Floats,
    light: Floats,
) -> None:
    """Blend objects of one `shape` into images (n, SIDE, SIDE, 3), at most one per image."""
    rows = np.array([i for i, _ in owned])
    objects = [o for _, o in owned]
    centre = np.array([POSITIONS[o.position] for o in objects], np.float32)
    centre = centre + SHIFT_JITTER * jitter[:, :2]
    radius = np.array([SIZES[o.size] for o in objects], np.float32)
    radius = radius * (1 + RADIUS_JITTER * jitter[:, 2])
    low, high = OBJECT_BRIGHTNESS
    brightness = (low + high) / 2 + (high - low) / 2 * jitter[:, 3:4]
    colour = np.array([COLOURS[o.colour] for o in objects], np.float32) * brightness
    x, y = grid()
    x, y = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    alpha = coverage(shape, x, y, radius[:, None, None])[..., None]
    lit = colour[:, None, None, :] * (0.5 + 0.5 * light[rows, ..., None])
    images[rows] = images[rows] * (1 - alpha) + lit * alpha


def render(scene: Scene, seed: int) -> NDArray[np.uint8]:
    """Render one scene with the jitter of `seed`: (SIDE, SIDE, 3), values 0 to 255."""
    image = render_batch([scene], np.random.default_rng(seed))[0]
    return np.rint(image * 255).astype(np.uint8)
