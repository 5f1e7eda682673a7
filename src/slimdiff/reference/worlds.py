"""The worlds that references are trained on: scenes of shapes, and emoji."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimdiff.reference import captions, scenes
from slimdiff.reference.emoji import captions as emoji_captions
from slimdiff.reference.emoji.glyphs import BUNDLED
from slimdiff.reference.emoji.judge import emoji_accuracy
from slimdiff.reference.emoji.render import render_batch
from slimdiff.reference.judge import scene_accuracy
from slimdiff.reference.reading import teach_scenes
from slimdiff.reference.tokenizer import LENGTH, words
from slimdiff.reference.world import Draw, Samples, Told, World


def _signed(rendered: NDArray[np.float32]) -> Tensor:
    """Images (n, 64, 64, 3) from 0 to 1 as (n, 3, 64, 64) from -1 to 1."""
    return torch.from_numpy(rendered).permute(0, 3, 1, 2).mul(2).sub(1).contiguous()


def draw_scenes(split: str, n: int, seed: int) -> Samples:
    """`n` scenes of a split; the quadrants that hold an object count."""
    batch = captions.scenes(split, n, seed)
    pixels = _signed(scenes.render_batch(batch, np.random.default_rng([seed, n])))
    taken = [[p in {o.position for o in s.objects} for p in scenes.POSITIONS] for s in batch]
    return Samples(pixels, [captions.caption(s) for s in batch], torch.tensor(taken))


def draw_emoji(split: str, n: int, seed: int, folder: Path = BUNDLED) -> Samples:
    """`n` emoji of a split, their glyphs of `folder`; every quadrant counts."""
    batch = emoji_captions.pairs(split, n, seed)
    pixels = _signed(render_batch(batch, np.random.default_rng([seed, n]), folder))
    texts = [emoji_captions.caption(pair) for pair in batch]
    return Samples(pixels, texts, torch.ones(n, len(scenes.POSITIONS), dtype=torch.bool))


def _draw_emoji_from(folder: Path) -> Draw:
    draw: Callable[..., Samples] = functools.partial(draw_emoji, folder=folder)
    return draw


SCENES = World(
    name="scenes",
    words=words,
    length=LENGTH,
    guidance=3.0,
    prompts=captions.prompts,
    draw=draw_scenes,
    judge=scene_accuracy,
    teach=teach_scenes,
    told=Told(
        drawn="It draws scenes of one or two objects on a lit background, 64 by 64 pixels, from "
        "captions such as",
        example="a large red circle top left and a small blue ring bottom right on navy background",
        unseen="No caption of the test, selection or calibration split was trained on, in either "
        "order of its objects.",
        right="Colour, shape and size count as right when they are so for every object of the "
        'image and no object is missing or too many; "whole" is everything at once.',
    ),
)

EMOJI = World(
    name="emoji",
    words=emoji_captions.words,
    length=emoji_captions.LENGTH,
    guidance=2.0,
    prompts=emoji_captions.prompts,
    draw=draw_emoji,
    judge=emoji_accuracy,
    drawn_from=_draw_emoji_from,
    told=Told(
        drawn="It draws 7,151 emoji of three sets (`noto`, `twemoji`, `fluent`) on a lit "
        "background of eight colours, 64 by 64 pixels, from captions such as",
        example="fluent red apple on navy background",
        unseen="Of all pairs of glyph g and background b, those with (5 g + b) mod 8 = 7 are the "
        "test split and were never trained on: every glyph has one test background. Calibration "
        "and selection prompts are disjoint parts of the pairs that were trained on.",
        right='"emoji" is right when, of all 7,151 glyphs, the true one is nearest to what is '
        'drawn once it is cropped; glyphs that look the same count as one. "whole" is both at '
        "once. The likeness of an image to its true glyph, where it fits best, is one minus their "
        "squared difference over the sum of their squares, both less the background: 1 is equal, "
        "0 is nothing drawn. The margin is (w - t) / (w + t) of the distances t to the true glyph "
        "and w to the nearest wrong one, -1 where nothing is drawn. Both are means over all "
        "images.",
        credits="Trained on pictures of Noto Emoji (Google, Apache-2.0), Twemoji (Twitter, Inc and "
        "other contributors, CC-BY 4.0) and Fluent Emoji (Microsoft Corporation, MIT), of the npm "
        "packages emoji-datasource-google 16.0.0, emoji-datasource-twitter 16.0.0 and "
        "@lobehub/fluent-emoji-3d 1.1.0. The pictures, resized to 64 by 64 pixels and compressed, "
        "come with slimdiff; their NOTICE.md has the licences.",
    ),
)
