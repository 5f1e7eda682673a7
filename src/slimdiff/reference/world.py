"""What references are trained to draw: captions, their pictures, and a judge of both, as data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from slimdiff.reference.accuracy import Accuracy
from slimdiff.reference.tokenizer import build_tokenizer, encode_captions

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


@dataclass(frozen=True)
class Samples:
    """Pictures of a world and what they show.

    Attributes:
        pixels: (n, 3, 64, 64), from -1 to 1.
        captions: n captions.
        occupied: (n, 4), bool: quadrants that count for more in training; alike if all do.
    """

    pixels: Tensor
    captions: list[str]
    occupied: Tensor


class Prompts(Protocol):
    """`n` captions of the split "train", "calibration", "selection" or "test"."""

    def __call__(self, split: str, n: int, seed: int = 0) -> list[str]:
        """The same for the same seed."""


class Judge(Protocol):
    """How many images (n, 64, 64, 3), arrays or PIL, show what their captions say."""

    def __call__(self, images: object, captions: Sequence[str]) -> Accuracy:
        """Shares by attribute, and measures of each image if there are any."""


Draw = Callable[[str, int, int], Samples]
"""(split, n, seed) -> pictures of `n` captions of a split."""

Teach = Callable[[nn.Module, Callable[[nn.Module, Tensor], Tensor], int, int], None]
"""(text encoder, its states of tokens, steps, seed): teaches it what captions mean."""


@dataclass(frozen=True)
class Told:
    """Words of a model card: what is drawn, of which caption, what is right, whose pictures."""

    drawn: str
    example: str
    unseen: str
    right: str
    credits: str = ""


@dataclass(frozen=True)
class World:
    """Captions, pictures and a judge.

    Attributes:
        name: the first part of the names of its references.
        words: every word of a caption, once, in the tokenizer's order.
        length: tokens of a padded caption.
        guidance: the guidance scale to sample with.
        prompts, draw, judge: as their types say.
        told: words of the model card.
        teach: what teaches a text encoder before it is trained with the denoiser, if anything does.
        drawn_from: `draw` with pictures of a folder in place of those that come with slimdiff.
    """

    name: str
    words: Callable[[], Sequence[str]]
    length: int
    guidance: float
    prompts: Prompts
    draw: Draw
    judge: Judge
    told: Told
    teach: Teach | None = None
    drawn_from: Callable[[Path], Draw] | None = None

    def tokenizer(self) -> CLIPTokenizer:
        """A new tokenizer of its words."""
        return build_tokenizer(self.words(), self.length)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Token ids (n, length), padded as pipelines pad them."""
        return encode_captions(_tokenizer_of(self), captions)


@functools.cache
def _tokenizer_of(world: World) -> CLIPTokenizer:
    return world.tokenizer()
