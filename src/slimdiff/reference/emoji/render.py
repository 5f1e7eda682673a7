"""Renders emoji: a glyph, scaled and shifted, on a background that light falls on from one side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from slimdiff.reference.emoji.captions import BACKGROUNDS, Pair
from slimdiff.reference.emoji.glyphs import BUNDLED, SIDE, glyph_pictures

SCALE = (0.72, 0.92)
"""Sides of a glyph over that of the image; it is shifted as far as it stays within."""

LIGHT = 0.12
"""Most that the background's brightness changes from the middle to an edge."""


def weighed(glyphs: NDArray[np.uint8]) -> Tensor:
    """Pictures (n, 64, 64, 4) as (n, 4, 64, 64) from 0 to 1, colours times coverage."""
    shares = torch.from_numpy(glyphs.copy()).permute(0, 3, 1, 2).float() / 255
    return torch.cat([shares[:, :3] * shares[:, 3:], shares[:, 3:]], 1)


def background_colours() -> Tensor:
    """(8, 3) from 0 to 1."""
    return torch.tensor(list(BACKGROUNDS.values())).float() / 255


def compose(glyphs: Tensor, colours: Tensor, scale: Tensor, shift: Tensor, light: Tensor) -> Tensor:
    """Images (n, 3, 64, 64) from 0 to 1.

    Args:
        glyphs: (n, 4, 64, 64), colours times coverage.
        colours: of the backgrounds, (n, 3).
        scale: (n,), of the glyphs' sides.
        shift: (n, 2), right and down, 1 being half of the image.
        light: (n, 2), change of brightness down and right, 1 being the most.
    """
    n = len(glyphs)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -shift / scale[:, None]
    where = affine_grid(theta, [n, 4, SIDE, SIDE], align_corners=False)
    placed = grid_sample(glyphs, where, align_corners=False)
    axis = torch.linspace(-1, 1, SIDE)
    ramp = light[:, :1, None] * axis[:, None] + light[:, 1:, None] * axis
    lit = 1 + LIGHT * ramp[:, None]
    ground = (colours[:, :, None, None] * lit).clamp(0, 1)
    return (placed[:, :3] + ground * (1 - placed[:, 3:])).clamp(0, 1)


def render_batch(
    batch: Sequence[Pair], rng: np.random.Generator, folder: Path = BUNDLED
) -> NDArray[np.float32]:
    """Render pairs, jittered by `rng`: (n, 64, 64, 3), values from 0 to 1."""
    places, backgrounds = (list(part) for part in zip(*batch))
    jitter = torch.from_numpy(rng.random((len(batch), 5)).astype(np.float32))
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * jitter[:, 0]
    shift = (2 * jitter[:, 1:3] - 1) * (1 - scale)[:, None]
    glyphs = weighed(glyph_pictures(folder)[places])
    colours = background_colours()[backgrounds]
    images = compose(glyphs, colours, scale, shift, 2 * jitter[:, 3:] - 1)
    return images.permute(0, 2, 3, 1).numpy()
