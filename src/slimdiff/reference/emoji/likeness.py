"""How like an image is to a glyph, wherever and however large it was drawn."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from slimdiff.reference.emoji.glyphs import SIDE
from slimdiff.reference.emoji.render import SCALE

SCALES = 7
"""Sizes of the glyph that are tried, evenly over those that are rendered."""

SPAN = 96
"""Side of the transforms: an image, and the shifts to either side of it."""


def likeness(images: Tensor, ground: Tensor, glyphs: Tensor) -> Tensor:
    """Likeness of each image to its glyph at the size and place where that is most: (n,).

    It is 2 <d, y> / (|d|^2 + |y|^2), with what is drawn, d = image - ground, and what should be,
    y = (glyph on the ground) - ground: 1 where both are equal, 0 where nothing is drawn, down to
    -1; it falls with the squared difference, 1 - |d - y|^2 / (|d|^2 + |y|^2).

    Args:
        images: (n, 3, 64, 64), from 0 to 1.
        ground: their backgrounds, (n, 3, 64, 64).
        glyphs: (n, 4, 64, 64), colours times coverage, and coverage.
    """
    drawn = images - ground
    energy = drawn.square().sum((1, 2, 3))[:, None, None]
    kept = [_spectrum(part) for part in (drawn, drawn * ground, ground, ground.square())]
    kept[1], kept[3] = kept[1].sum(1, keepdim=True), kept[3].sum(1, keepdim=True)
    found = []
    for scale in torch.linspace(*SCALE, SCALES).tolist():
        cross, square = _products(kept, _scaled(glyphs, scale))
        reach = _reach(scale)
        inner, total = (_within(part, reach) for part in (cross, square))
        found.append((2 * inner / (energy + total.clamp_min(1e-6))).flatten(1).amax(1))
    return torch.stack(found).amax(0)


def _scaled(glyphs: Tensor, scale: float) -> Tensor:
    """Glyphs (n, 4, 64, 64), smaller, in the middle."""
    theta = torch.tensor([[1 / scale, 0.0, 0.0], [0.0, 1 / scale, 0.0]])
    size = list(glyphs.shape)
    where = affine_grid(theta.expand(size[0], 2, 3), size, align_corners=False)
    return grid_sample(glyphs, where, align_corners=False)


def _products(kept: list[Tensor], glyphs: Tensor) -> tuple[Tensor, Tensor]:
    """<d, y> and |y|^2 at every shift of `glyphs`, (n, SPAN, SPAN), by Fourier transforms.

    y = t - a o with colours t times coverage a and ground o, so <d, y> = <d, t> - <sum(d o), a> and
    |y|^2 = |t|^2 - 2 <o, t a> + <sum(o^2), a^2>, sums over colours.
    """
    colours, cover = glyphs[:, :3], glyphs[:, 3:]
    drawn, on_ground, ground, squares = kept
    cross = _correlated(drawn, colours) - _correlated(on_ground, cover)
    square = _correlated(squares, cover.square()) - 2 * _correlated(ground, colours * cover)
    made = torch.fft.irfft2(torch.stack([cross, square]), s=(SPAN, SPAN))
    return made[0], made[1] + colours.square().sum((1, 2, 3))[:, None, None]


def _spectrum(planes: Tensor) -> Tensor:
    return torch.fft.rfft2(planes, s=(SPAN, SPAN))


def _correlated(spectrum: Tensor, planes: Tensor) -> Tensor:
    return (spectrum * _spectrum(planes).conj()).sum(1)


def _reach(scale: float) -> int:
    """Pixels by which a glyph of this size may be shifted."""
    return round((1 - scale) * SIDE / 2) + 1


def _within(plane: Tensor, reach: int) -> Tensor:
    """Values (n, 2 reach + 1, 2 reach + 1) at shifts of at most `reach`; negative ones wrap."""
    places = torch.arange(-reach, reach + 1)
    return plane[:, places][:, :, places]
