"""The judge: reads a scene off an image by its pixels alone, and scores images of captions.

Each quadrant is matched against the renderer's own masks over shape, radius and shift. A quadrant
that holds something which no mask explains reads as an unknown shape, so that a smear, a second
object in the quadrant or an object off its place is never forgiven.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d

from slimdiff.reference.accuracy import Accuracy
from slimdiff.reference.captions import parse
from slimdiff.reference.pixels import SIDE, as_pixels
from slimdiff.reference.scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    coverage,
)

UNKNOWN = "unknown"
ATTRIBUTES = ("background", "colour", "shape", "size", "position", "whole")

HALF = SIDE // 2
REACH = 5
"""Largest shift, in pixels, of an object's centre from its position's centre."""

CONTRAST = 0.16
"""Least distance (RGB from 0 to 1) of an object's pixel from the background around it."""

LEAST_MASS = 10.0
"""Fewest foreground pixels that count as an object."""

MISFIT = 0.17
"""Most that a mask may leave unexplained, as a share of its mass."""

PLAINLY_WRONG = 0.6
"""Error of coverage beyond which a pixel is not just blurred."""

SPECKS = 4
"""Plainly wrong pixels that any quadrant may have."""


@functools.cache
def _templates() -> tuple[list[tuple[str, str]], Tensor]:
    """(shape, size) of each mask, and the masks (t, HALF, HALF), centred."""
    line = np.arange(HALF, dtype=np.float32) + 0.5 - HALF / 2
    x, y = line[None, :], line[:, None]
    names, masks = [], []
    for size, nominal in SIZES.items():
        for factor in (0.92, 0.96, 1.0, 1.04, 1.08):
            for shape in SHAPES:
                names.append((shape, size))
                masks.append(coverage(shape, x, y, np.float32(nominal * factor)))
    return names, torch.from_numpy(np.stack(masks).astype(np.float32))


def fit_background(pixels: Tensor, rounds: int = 4) -> Tensor:
    """The smooth background of `pixels` (n, s, s, 3): a plane per channel, robust to objects."""
    n, side = len(pixels), pixels.shape[1]
    line = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    basis = torch.stack([torch.ones_like(x), x, y], -1).reshape(-1, 3)
    flat = pixels.reshape(n, -1, 3)
    free = (x.abs() > 0.93) | (y.abs() > 0.93) | (x.abs() < 0.05) | (y.abs() < 0.05)
    start = flat[:, free.flatten()].median(1).values[:, None]
    plane = start.expand_as(flat)
    for limit in torch.linspace(0.25, 0.1, rounds):
        near = ((flat - plane).norm(dim=-1) < limit).float()[..., None]
        gram = torch.einsum("npo,pi,pj->nij", near, basis, basis) + 1e-3 * torch.eye(3)
        moment = torch.einsum("npc,pi->nic", near * flat, basis)
        plane = torch.einsum("pi,nic->npc", basis, torch.linalg.solve(gram, moment))
    return plane.reshape_as(pixels)


def _nearest(colours: Tensor, palette: dict[str, tuple[int, int, int]]) -> list[str]:
    """The palette's nearest colour to each of (n, 3), whatever its brightness within reason."""
    table = torch.tensor(list(palette.values())).float() / 255
    gain = (colours @ table.T) / table.square().sum(-1)
    gain = gain.clamp(0.75, 1.25)[..., None]
    error = (colours[:, None] - gain * table).square().sum(-1)
    return [tuple(palette)[i] for i in error.argmin(1).tolist()]


def _quadrants(x: Tensor) -> Tensor:
    """(n, 64, 64, c) to (4 n, 32, 32, c): the positions of an image follow one another."""
    n, _, _, c = x.shape
    return x.reshape(n, 2, HALF, 2, HALF, c).transpose(2, 3).reshape(4 * n, HALF, HALF, c)


def _object_colours(pixels: Tensor, contrast: Tensor) -> Tensor:
    """Median colour of the half of the foreground with most contrast, per quadrant (q, 3)."""
    flat, strength = pixels.flatten(1, 2), contrast.flatten(1)
    colours = torch.zeros(len(flat), 3)
    for q, (p, s) in enumerate(zip(flat, strength)):
        inside = s > CONTRAST
        if inside.any():
            colours[q] = p[s >= s[inside].median()].median(0).values
    return colours


def _match(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Best mask of each quadrant's coverage (q, 32, 32), and what it leaves unexplained (q,).

    Unexplained is the larger of the squared error and of the count of plainly wrong pixels, which
    a blurred edge has not, both as a share of the mask's mass.
    """
    _, masks = _templates()
    mass = masks.square().sum((1, 2))
    overlap, shift = conv2d(alpha[:, None], masks[:, None], padding=REACH).flatten(2).max(-1)
    error = (alpha.square().sum((1, 2))[:, None] - 2 * overlap + mass) / mass
    best = error.argmin(1)
    rows = torch.arange(len(best))
    placed = _shifted(masks[best], shift[rows, best])
    wrong = ((alpha - placed).abs() > PLAINLY_WRONG).sum((1, 2))
    return best, torch.maximum(error[rows, best], (wrong - SPECKS) / mass[best])


def _shifted(masks: Tensor, shift: Tensor) -> Tensor:
    """Each mask (q, 32, 32) moved to the place that `shift`, an index of the search, stands for."""
    span = 2 * REACH + 1
    down, right = shift // span - REACH, shift % span - REACH
    line = torch.arange(HALF)
    rows, columns = line - down[:, None], line - right[:, None]
    inside = ((rows >= 0) & (rows < HALF))[:, :, None] & ((columns >= 0) & (columns < HALF))[
        :, None
    ]
    q = torch.arange(len(masks))[:, None, None]
    picked = masks[q, rows.clamp(0, HALF - 1)[:, :, None], columns.clamp(0, HALF - 1)[:, None]]
    return picked * inside


@torch.no_grad()
def judge_batch(images: object) -> list[Scene]:
    """Read the scene off each image; what no mask explains reads as shape "unknown"."""
    pixels = as_pixels(images)
    plane = fit_background(pixels)
    backgrounds = _nearest(plane.mean((1, 2)), BACKGROUNDS)
    quadrants, planes = _quadrants(pixels), _quadrants(plane)
    contrast = (quadrants - planes).norm(dim=-1)
    present = (contrast > CONTRAST).sum((1, 2)) >= LEAST_MASS
    colours = _object_colours(quadrants, contrast)
    step = colours[:, None, None] - planes
    alpha = ((quadrants - planes) * step).sum(-1) / step.square().sum(-1).clamp_min(1e-3)
    best, misfit = _match(alpha.clamp(0, 1.2) * present[:, None, None])
    objects = _objects(present, _nearest(colours, COLOURS), best, misfit)
    return [Scene(tuple(o), b) for o, b in zip(objects, backgrounds)]


def _objects(
    present: Tensor, colours: Sequence[str], best: Tensor, misfit: Tensor
) -> list[list[Object]]:
    names, _ = _templates()
    found: list[list[Object]] = [[] for _ in range(len(present) // 4)]
    for q in present.nonzero().flatten().tolist():
        shape, size = names[int(best[q])]
        shape = shape if misfit[q] <= MISFIT else UNKNOWN
        found[q // 4].append(Object(size, colours[q], shape, tuple(POSITIONS)[q % 4]))
    return found


def judge(image: NDArray[np.uint8] | NDArray[np.float32]) -> Scene:
    """Read the scene off one image (64, 64, 3), uint8 or floats from 0 to 1."""
    return judge_batch([image])[0]


def compare(read: Scene, wanted: Scene) -> dict[str, bool]:
    """Which attributes of `read` are as `wanted`, each for all objects at once.

    "position" means: objects where they are wanted and nowhere else. Colour, shape and size are
    compared place by place; an object that is missing or too many is wrong in all of them.
    """
    here = {o.position: o for o in read.objects}
    there = {o.position: o for o in wanted.objects}
    same = {"background": read.background == wanted.background, "position": set(here) == set(there)}
    for name in ("colour", "shape", "size"):
        pairs = [(here.get(p), there.get(p)) for p in {*here, *there}]
        same[name] = all(a and b and getattr(a, name) == getattr(b, name) for a, b in pairs)
    same["whole"] = all(same.values())
    return {name: same[name] for name in ATTRIBUTES}


def scene_accuracy(images: object, captions: Sequence[str], chunk: int = 64) -> Accuracy:
    """Judge images (n, 64, 64, 3), arrays or PIL, against their captions."""
    pixels = as_pixels(images)
    if len(pixels) != len(captions):
        raise ValueError(f"{len(pixels)} images but {len(captions)} captions")
    read = [scene for part in pixels.split(chunk) for scene in judge_batch(part)]
    rights = [compare(scene, parse(text)) for scene, text in zip(read, captions)]
    shares = {a: sum(r[a] for r in rights) / len(rights) for a in ATTRIBUTES}
    return Accuracy(len(rights), shares)
