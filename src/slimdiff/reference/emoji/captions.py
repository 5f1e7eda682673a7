"""Captions of emoji: writing, parsing, and disjoint sets of prompts.

Of the pairs of glyph g and background b, those with (5 g + b) mod 8 = 7 are tests, one for every
glyph, and were never trained on. Calibration and selection prompts are two eighths of the others.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from slimdiff.errors import SlimdiffError
from slimdiff.reference.emoji.glyphs import STYLES, glyph_names

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 240),
    "black": (18, 18, 20),
    "navy": (24, 38, 92),
    "teal": (20, 120, 118),
    "pink": (250, 190, 205),
    "yellow": (252, 214, 90),
    "green": (60, 140, 70),
    "violet": (122, 84, 180),
}
EIGHTHS: dict[str, tuple[int, ...]] = {
    "train": (0, 1, 2, 3, 4, 5, 6),
    "calibration": (2,),
    "selection": (5,),
    "test": (7,),
}
"""Values of (5 g + b) mod 8 that each split owns; calibration and selection are trained on too."""

LENGTH = 24
"""Tokens of a padded caption; the longest has 17 words."""

Pair = tuple[int, int]
"""Numbers of a glyph and of a background."""


def caption(pair: Pair) -> str:
    """The caption of a glyph on a background."""
    (style, name), background = glyph_names()[pair[0]], tuple(BACKGROUNDS)[pair[1]]
    return f"{style} {name} on {background} background"


@functools.cache
def _pairs_by_caption() -> dict[str, Pair]:
    return {caption((g, b)): (g, b) for g in range(len(glyph_names())) for b in range(8)}


def parse(text: str) -> Pair:
    """The pair that a caption describes; the inverse of `caption`."""
    if text not in _pairs_by_caption():
        raise ValueError(
            f"not a caption of an emoji: {text!r}; expected for example "
            "'fluent red apple on navy background'"
        )
    return _pairs_by_caption()[text]


def split_pairs(split: str) -> NDArray[np.int64]:
    """All pairs of a split, (n, 2), by glyph and then by background."""
    if split not in EIGHTHS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(EIGHTHS)}")
    glyphs, backgrounds = np.mgrid[: len(glyph_names()), : len(BACKGROUNDS)]
    owned = np.isin((5 * glyphs + backgrounds) % 8, EIGHTHS[split])
    return np.stack([glyphs[owned], backgrounds[owned]], -1)


def pairs(split: str, n: int, seed: int = 0) -> list[Pair]:
    """`n` distinct pairs of one split, in an order drawn by `seed`.

    Raises:
        SlimdiffError: the split has fewer.
    """
    owned = split_pairs(split)
    if n > len(owned):
        raise SlimdiffError(
            f"{n} emoji prompts of the {split} split, expected at most {len(owned)}"
        )
    rng = np.random.default_rng([tuple(EIGHTHS).index(split), seed])
    return [(int(g), int(b)) for g, b in owned[rng.permutation(len(owned))[:n]]]


def prompts(split: str, n: int, seed: int = 0) -> list[str]:
    """`n` distinct captions of one split ("train", "calibration", "selection" or "test")."""
    return [caption(pair) for pair in pairs(split, n, seed)]


@functools.cache
def words() -> tuple[str, ...]:
    """Every word of a caption, once."""
    names = sorted({name for _, name in glyph_names()})
    phrases = [*names, *STYLES, "on background", *BACKGROUNDS]
    return tuple(dict.fromkeys(" ".join(phrases).split()))
