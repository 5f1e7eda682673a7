"""The judge of emoji: reads background and glyph off an image by its pixels alone.

The background is that of the border. What differs from it is cropped, and compared with every
glyph, cropped alike and laid over the same ground: the nearest is what the image shows. Glyphs that
nobody can tell apart count as one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from slimdiff.reference.accuracy import Accuracy
from slimdiff.reference.emoji.captions import Pair, parse
from slimdiff.reference.emoji.glyphs import SIDE, glyph_pictures
from slimdiff.reference.emoji.likeness import likeness
from slimdiff.reference.emoji.render import background_colours, weighed
from slimdiff.reference.pixels import as_pixels

ATTRIBUTES = ("background", "emoji", "whole")

TEMPLATE = 24
"""Height and width of a cropped glyph."""

CONTRAST = 0.07
"""Least difference of a channel (0 to 1) from the ground around it of what is drawn."""

LEAST_PIXELS = 2
"""Fewest such pixels of a row or column that the drawing reaches."""

LEAST_SIDE = 3
"""Smallest height and width of a drawing."""

SAME = 2e-4
"""Mean squared difference of two glyphs' templates below which they count as the same."""


def fit_ground(images: Tensor, rounds: int = 3) -> Tensor:
    """The ground of images (n, 3, 64, 64): a plane per channel, by what the borders agree on."""
    line = torch.linspace(-1, 1, SIDE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    basis, border = torch.stack([torch.ones_like(x), x, y], -1), _border()
    own, flat = basis[border], images[:, :, border].mT
    plane = flat.median(1, keepdim=True).values.expand_as(flat)
    for limit in [0.2, *[0.08] * (rounds - 1)]:
        near = ((flat - plane).abs().amax(-1) < limit).float()
        gram = torch.einsum("nb,bi,bj->nij", near, own, own) + 1e-3 * torch.eye(3)
        moment = torch.einsum("nb,bi,nbc->nic", near, own, flat)
        solved = torch.linalg.solve(gram, moment)
        plane = own @ solved
    return torch.einsum("rsi,nic->ncrs", basis, solved)


@functools.cache
def _border() -> Tensor:
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    return ~inside


def read_backgrounds(images: Tensor) -> Tensor:
    """Number of the background of each of images (n, 3, 64, 64): (n,)."""
    edges = images[:, :, _border()].median(-1).values
    return torch.cdist(edges, background_colours()).argmin(1)


def boxes(drawn: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4): top, bottom, left and right of what is true in (n, 64, 64), and which exist.

    Rows and columns count that have `least` such pixels; a box that is missing is the whole image.
    """
    line, edges = torch.arange(SIDE), []
    for across in (2, 1):
        counts = drawn.sum(across) >= least
        edges.append(torch.where(counts, line, SIDE).amin(1))
        edges.append(torch.where(counts, line, -1).amax(1) + 1)
    found = torch.stack(edges, -1).float()
    height, width = found[:, 1] - found[:, 0], found[:, 3] - found[:, 2]
    exist = (height >= LEAST_SIDE) & (width >= LEAST_SIDE)
    whole = torch.tensor([0.0, SIDE, 0.0, SIDE])
    return torch.where(exist[:, None], found, whole), exist


def crop(images: Tensor, found: Tensor) -> Tensor:
    """What is in boxes (n, 4) of images (n, c, 64, 64), averaged to (n, c, 24, 24)."""
    rows, columns = _averages(found[:, 0], found[:, 1]), _averages(found[:, 2], found[:, 3])
    return torch.einsum("nir,ncrs,njs->ncij", rows, images, columns)


def _averages(low: Tensor, high: Tensor) -> Tensor:
    """Weights (n, 24, 64) of pixels in equal parts of the ranges from `low` to `high` (n,)."""
    edges = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, TEMPLATE + 1)
    pixel = torch.arange(SIDE, dtype=torch.float32)
    starts = torch.maximum(edges[:, :-1, None], pixel)
    overlap = (torch.minimum(edges[:, 1:, None], pixel + 1) - starts).clamp_min(0)
    return overlap / overlap.sum(-1, keepdim=True)


@functools.cache
def _templates() -> Tensor:
    """Every glyph, cropped: (g, 4, 24, 24), colours times coverage, and coverage."""
    parts = []
    pictures = glyph_pictures()
    for start in range(0, len(pictures), 512):
        glyphs = weighed(pictures[start : start + 512])
        found, _ = boxes(glyphs[:, 3] > 0.3, 1)
        parts.append(crop(glyphs, found))
    return torch.cat(parts)


def distances(crops: Tensor, grounds: Tensor) -> Tensor:
    """Mean squared difference of crops (n, 3, 24, 24) from every glyph on `grounds`: (n, g).

    A glyph on a ground is t + a o with colours t times coverage, ground o and a = 1 - coverage;
    the square of its difference from a crop c is multiplied out, so that no image is made.
    """
    colours, clear = _templates()[:, :3], 1 - _templates()[:, 3:]
    flat, own = colours.flatten(1), crops.flatten(1)
    total = flat.square().sum(1) + own.square().sum(1, keepdim=True)
    total = total + grounds.square().sum(1).flatten(1) @ clear.square().flatten(1).T
    total = total + 2 * grounds.flatten(1) @ (colours * clear).flatten(1).T
    total = total - 2 * own @ flat.T
    total = total - 2 * (grounds * crops).sum(1).flatten(1) @ clear.flatten(1).T
    return total / own.shape[1]


def _same(glyphs: Tensor) -> Tensor:
    """Which of all glyphs count as the same as each of `glyphs` (n,): (n, g), bool."""
    flat = _templates().flatten(1)
    norms = flat.square().sum(1)
    squares = norms[glyphs, None] + norms - 2 * flat[glyphs] @ flat.T
    same = squares / flat.shape[1] < SAME
    same[torch.arange(len(glyphs)), glyphs] = True
    return same


@torch.no_grad()
def _judged(images: Tensor, batch: Sequence[Pair]) -> dict[str, list[float]]:
    """Attributes and measures of images (n, 3, 64, 64) that are to show the pairs."""
    glyphs, backgrounds = torch.tensor(batch).T
    ground = fit_ground(images)
    drawn = (images - ground).abs().amax(1) > CONTRAST
    found, exist = boxes(drawn, LEAST_PIXELS)
    errors = distances(crop(images, found), crop(ground, found)).clamp_min(1e-9)
    same = _same(glyphs)
    right = torch.where(same, errors, torch.inf).amin(1)
    wrong = torch.where(same, torch.inf, errors).amin(1)
    margin = torch.where(exist, (wrong - right) / (wrong + right), -1.0)
    made = {"background": read_backgrounds(images) == backgrounds, "emoji": margin > 0}
    made["whole"] = made["background"] & made["emoji"]
    made["likeness"] = likeness(images, ground, weighed(glyph_pictures()[glyphs.numpy()]))
    made["margin"] = margin
    return {name: values.tolist() for name, values in made.items()}


def emoji_accuracy(images: object, captions: Sequence[str], chunk: int = 64) -> Accuracy:
    """Judge images (n, 64, 64, 3), arrays or PIL, against their captions.

    Beside the shares that are right it has two measures of each image: "likeness" to the true glyph
    where it fits best (`likeness`), and "margin" (w - t) / (w + t) of the distances t to the true
    glyph and w to the nearest wrong one: 1 for no other than the true glyph, above 0 for a right
    one, -1 where nothing is drawn.

    Raises:
        ValueError: images of other sizes, other captions, or not as many of both.
    """
    pixels = as_pixels(images).permute(0, 3, 1, 2)
    if len(pixels) != len(captions):
        raise ValueError(f"{len(pixels)} images but {len(captions)} captions")
    batch = [parse(text) for text in captions]
    starts = range(0, len(batch), chunk)
    parts = [_judged(pixels[i : i + chunk], batch[i : i + chunk]) for i in starts]
    made = {name: [v for part in parts for v in part[name]] for name in parts[0]}
    shares = {name: sum(made[name]) / len(batch) for name in ATTRIBUTES}
    graded = {name: tuple(made[name]) for name in ("likeness", "margin")}
    return Accuracy(len(batch), shares, graded)
