"""The glyphs: a list of what they are called, and an atlas of pictures for each style.

`glyphs.txt` has a line for each glyph, its style and then its name; a glyph goes by the number of
its line. `STYLE.webp` holds the glyphs of a style in the order of their lines, 64 columns of tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimdiff.reference.pixels import SIDE

STYLES = ("noto", "twemoji", "fluent")
BUNDLED = Path(__file__).parent / "atlas"
"""Folder of the glyphs that come with slimdiff."""

COLUMNS = 64
LIST = "glyphs.txt"


@functools.cache
def glyph_names(folder: Path = BUNDLED) -> tuple[tuple[str, str], ...]:
    """(style, name) of every glyph.

    Raises:
        FileNotFoundError: the folder has no glyphs.
    """
    if not (folder / LIST).is_file():
        raise FileNotFoundError(
            f"{folder} has no {LIST}; `python -m slimdiff.reference.emoji.packages` makes one"
        )
    lines = (folder / LIST).read_text(encoding="utf-8").splitlines()
    return tuple((style, name) for style, _, name in (line.partition(" ") for line in lines))


@functools.cache
def glyph_pictures(folder: Path = BUNDLED) -> NDArray[np.uint8]:
    """Pictures of every glyph: (n, 64, 64, 4), red, green, blue and coverage; do not change it."""
    from PIL import Image

    names = glyph_names(folder)
    pictures = np.zeros((len(names), SIDE, SIDE, 4), np.uint8)
    for style in STYLES:
        places = places_of(names, style)
        with Image.open(folder / f"{style}.webp") as image:
            pictures[places] = from_atlas(np.asarray(image.convert("RGBA")), len(places))
    pictures.flags.writeable = False
    return pictures


def places_of(names: Sequence[tuple[str, str]], style: str) -> list[int]:
    """Numbers of the glyphs of one style."""
    return [i for i, (own, _) in enumerate(names) if own == style]


def to_atlas(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Tiles (n, 64, 64, 4) to one picture, row by row, 64 to a row."""
    rows = -(-len(pictures) // COLUMNS)
    padded = np.zeros((rows * COLUMNS, *pictures.shape[1:]), np.uint8)
    padded[: len(pictures)] = pictures
    tiles = padded.reshape(rows, COLUMNS, SIDE, SIDE, 4).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(rows * SIDE, COLUMNS * SIDE, 4)


def from_atlas(picture: NDArray[np.uint8], n: int) -> NDArray[np.uint8]:
    """The first `n` tiles of a picture; the inverse of `to_atlas`."""
    tiles = picture.reshape(-1, SIDE, COLUMNS, SIDE, 4).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(-1, SIDE, SIDE, 4)[:n]
