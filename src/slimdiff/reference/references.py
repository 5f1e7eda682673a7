"""The reference pipelines that can be trained, by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from slimdiff.reference.contract import Reference
from slimdiff.reference.dit import DitReference
from slimdiff.reference.optim import Rates
from slimdiff.reference.unet import UnetReference
from slimdiff.reference.worlds import EMOJI

TRAINABLE: dict[str, Reference] = {
    "scenes-unet": UnetReference(),
    "scenes-dit": DitReference(),
    "scenes-dit-qknorm": DitReference(qk_norm="rms_norm"),
    "emoji-unet": UnetReference(
        world=EMOJI,
        latent_channels=8,
        vae_channels=(48, 96, 128),
        text_width=256,
        text_layers=4,
        text_heads=8,
        unet_channels=(128, 192, 224),
        unet_heads=(3, 4, 4),
        attention_levels=3,
        muon_text=True,
        rates=Rates(adam=1e-3, weight_decay=0.02),
    ),
}


def reference(name: str) -> Reference:
    """The reference called `name`.

    Raises:
        KeyError: no such reference.
    """
    if name not in TRAINABLE:
        raise KeyError(f"no reference pipeline {name!r}; trainable: {', '.join(TRAINABLE)}")
    return TRAINABLE[name]


def sampling_of(name: str) -> dict[str, Any]:
    """How to call the reference called `name`: options of its pipeline, the steps not among them.

    Raises:
        KeyError: no such reference.
    """
    return dict(next(iter(reference(name).sampling.values())))


def with_pictures(kind: Reference, folder: str) -> Reference:
    """`kind`, its world drawn with the pictures of a folder, if one is named.

    Raises:
        ValueError: its world is not made of pictures.
    """
    world: Any = kind.world
    if not folder:
        return kind
    if world.drawn_from is None:
        raise ValueError(f"the world of {world.name} is drawn without pictures; leave out {folder}")
    return replace(kind, world=replace(world, draw=world.drawn_from(Path(folder))))  # type: ignore[type-var]  # a dataclass
