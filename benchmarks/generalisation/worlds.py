"""What the models of the generalisation set draw, and which trained networks each world lends.

Every model of a world shares its autoencoder and text encoder, those of bundled references, so
that only a denoiser has to be trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from slimdiff.reference.bundled import bundled_path
from slimdiff.reference.emoji.captions import Pair, caption, split_pairs
from slimdiff.reference.emoji.render import render_batch
from slimdiff.reference.world import Samples, World
from slimdiff.reference.worlds import EMOJI, SCENES

ONE_IN = 3
"""Of the emoji, one in so many is drawn: a small model learns all of them too slowly."""

SPLITS = ("train", "calibration", "selection", "test")


@dataclass(frozen=True)
class Lent:
    """A world, and where its trained networks lie.

    Attributes:
        world: captions and pictures.
        vae: the bundled reference whose autoencoder is taken.
        encoders: for each kind of pipeline, (part, reference, folder) of the text encoders that
            are taken; a part is a path in the network "text", "" for the whole of it.
        widths: of the autoencoder and of the text encoders, fields of `Architecture`.
    """

    world: World
    vae: str
    encoders: dict[str, tuple[tuple[str, str, str], ...]]
    widths: dict[str, Any]

    def teach(self, kind: str, text: nn.Module) -> None:
        """Give the network "text" of a pipeline of `kind` the trained weights that there are."""
        for part, reference, folder in self.encoders[kind]:
            trained = load_file(bundled_path(reference) / folder / "model.safetensors")
            take(text.get_submodule(part), trained)


@torch.no_grad()
def take(encoder: nn.Module, trained: dict[str, torch.Tensor]) -> None:
    """Load a text encoder's weights; a projection that they lack passes on what it gets.

    Raises:
        KeyError: another weight is lacking.
    """
    bare = {name.removeprefix("text_model."): weight for name, weight in trained.items()}
    for name, parameter in encoder.named_parameters():
        if name == "text_projection.weight" and name not in bare:
            nn.init.eye_(parameter)
        else:
            parameter.copy_(bare[name.removeprefix("text_model.")])


def _pairs(split: str, n: int, seed: int) -> list[Pair]:
    """`n` random pairs of a split among the emoji that are drawn, distinct as far as there are."""
    owned = split_pairs(split)
    owned = owned[owned[:, 0] % ONE_IN == 0]
    rng = np.random.default_rng([SPLITS.index(split), seed])
    rounds = [owned[rng.permutation(len(owned))] for _ in range(-(-n // len(owned)))]
    return [(int(g), int(b)) for g, b in np.concatenate(rounds)[:n]]


def _prompts(split: str, n: int, seed: int = 0) -> list[str]:
    return [caption(pair) for pair in _pairs(split, n, seed)]


def _draw(split: str, n: int, seed: int) -> Samples:
    batch: Sequence[Pair] = _pairs(split, n, seed)
    rendered = render_batch(batch, np.random.default_rng([seed, n]))
    pixels = torch.from_numpy(rendered).permute(0, 3, 1, 2).mul(2).sub(1).contiguous()
    return Samples(pixels, [caption(pair) for pair in batch], torch.ones(n, 4, dtype=torch.bool))


WORLDS: dict[str, Lent] = {
    "scenes": Lent(
        SCENES,
        vae="scenes-unet",
        encoders={
            "unet": (("", "scenes-unet", "text_encoder"),),
            "sd3": (
                ("first", "scenes-dit", "text_encoder"),
                ("second", "scenes-dit", "text_encoder_2"),
            ),
        },
        widths={},
    ),
    "emoji": Lent(
        replace(EMOJI, prompts=_prompts, draw=_draw, drawn_from=None),
        vae="emoji-unet",
        encoders={
            "unet": (("", "emoji-unet", "text_encoder"),),
            "sd3": (("first", "emoji-unet", "text_encoder"),),
        },
        widths={
            "latent_channels": 8,
            "vae_channels": (48, 96, 128),
            "text_width": 256,
            "text_layers": 4,
            "text_heads": 8,
        },
    ),
}


def world_named(name: str) -> Lent:
    """The world of that name.

    Raises:
        KeyError: unknown; says what is known.
    """
    if name not in WORLDS:
        raise KeyError(f"no world {name!r}; known: {', '.join(WORLDS)}")
    return WORLDS[name]


def distinct(world: World, split: str, count: int) -> list[str]:
    """`count` distinct prompts of a split."""
    return list(dict.fromkeys(world.prompts(split, 2 * count)))[:count]
