"""The reference pipelines that can be trained, by name."""

from __future__ import annotations

from slimdiff.reference.contract import Reference
from slimdiff.reference.dit import DitReference
from slimdiff.reference.unet import UnetReference

TRAINABLE: dict[str, Reference] = {
    "scenes-unet": UnetReference(),
    "scenes-dit": DitReference(),
    "scenes-dit-qknorm": DitReference(qk_norm="rms_norm"),
}


def reference(name: str) -> Reference:
    """The reference called `name`.

    Raises:
        KeyError: no such reference.
    """
    if name not in TRAINABLE:
        raise KeyError(f"no reference pipeline {name!r}; trainable: {', '.join(TRAINABLE)}")
    return TRAINABLE[name]
