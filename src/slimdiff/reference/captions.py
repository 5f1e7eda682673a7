"""Captions of scenes: writing, parsing, and disjoint sets of prompts."""

from __future__ import annotations

import hashlib
import re

import numpy as np

from slimdiff.reference.scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Object,
    Scene,
)

HELD_OUT = ("calibration", "selection", "test")
SPLITS = ("train", *HELD_OUT)
HELD_OUT_PERCENT = 5
"""Share of all captions, in percent, that each held-out split owns."""


def _any(words: object) -> str:
    return "|".join(words)  # type: ignore[arg-type]  # words are strings


_OBJECT = (
    rf"a (?P<size>{_any(SIZES)}) (?P<colour>{_any(COLOURS)})"
    rf" (?P<shape>{_any(SHAPES)}) (?P<position>{_any(POSITIONS)})"
)
_CAPTION = re.compile(rf"(?P<objects>a .+) on (?P<background>{_any(BACKGROUNDS)}) background")


def caption(scene: Scene) -> str:
    """The caption of `scene`, which names its objects in their order."""
    objects = (f"a {o.size} {o.colour} {o.shape} {o.position}" for o in scene.objects)
    return f"{' and '.join(objects)} on {scene.background} background"


def parse(text: str) -> Scene:
    """The scene that a caption describes; the inverse of `caption`."""
    whole = _CAPTION.fullmatch(text)
    parts = whole["objects"].split(" and ") if whole else []
    matches = [re.fullmatch(_OBJECT, part) for part in parts]
    objects = tuple(Object(**match.groupdict()) for match in matches if match)
    distinct = len({o.position for o in objects}) == len(objects)
    if whole is None or len(objects) != len(parts) or not 1 <= len(objects) <= 2 or not distinct:
        raise ValueError(
            f"not a caption of a scene: {text!r}; expected for example "
            "'a large red circle top left and a small blue ring bottom right on navy background'"
        )
    return Scene(objects, whole["background"])


def split_of(scene: Scene) -> str:
    """The split that owns `scene`, the same whichever object its caption names first."""
    digest = hashlib.sha256(caption(scene.canonical()).encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % 100 // HELD_OUT_PERCENT
    return HELD_OUT[bucket] if bucket < len(HELD_OUT) else "train"


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of one or two objects (equally often), every word drawn uniformly."""
    count = 1 + int(rng.integers(2))
    places = rng.permutation(len(POSITIONS))[:count]
    draws = rng.random((count, 3))
    objects = tuple(
        Object(
            size=_pick(tuple(SIZES), size),
            colour=_pick(tuple(COLOURS), colour),
            shape=_pick(SHAPES, shape),
            position=tuple(POSITIONS)[place],
        )
        for place, (size, colour, shape) in zip(places, draws)
    )
    return Scene(objects, _pick(tuple(BACKGROUNDS), rng.random()))


def _pick(words: tuple[str, ...], share: float) -> str:
    return words[int(share * len(words))]


def scenes(split: str, n: int, seed: int = 0) -> list[Scene]:
    """`n` random scenes of one split; those of held-out splits are never trained on."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    rng = np.random.default_rng([SPLITS.index(split), seed])
    found: list[Scene] = []
    while len(found) < n:
        scene = random_scene(rng)
        if split_of(scene) == split:
            found.append(scene)
    return found


def prompts(split: str, n: int, seed: int = 0) -> list[str]:
    """`n` captions of one split ("train", "calibration", "selection" or "test")."""
    return [caption(scene) for scene in scenes(split, n, seed)]
