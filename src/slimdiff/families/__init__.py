"""Model families: one data file each. Every module in this folder defines `FAMILY`."""

from __future__ import annotations

import importlib
import pkgutil

from torch import nn

from slimdiff.errors import SlimdiffError
from slimdiff.groups import Family, Group, resolve


def _load() -> dict[str, Family]:
    families: dict[str, Family] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        family: Family = importlib.import_module(f"{__name__}.{info.name}").FAMILY
        if family.denoiser in families:
            raise RuntimeError(f"two families describe {family.denoiser}; remove one")
        families[family.denoiser] = family
    return families


FAMILIES = _load()


def family_of(denoiser: nn.Module) -> Family:
    """The family of `denoiser`, found by its class or the nearest of its base classes.

    Raises:
        SlimdiffError: no family describes it; the error lists what is known.
    """
    for base in type(denoiser).__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
    raise SlimdiffError(
        f"no family describes {type(denoiser).__name__}; known: {', '.join(sorted(FAMILIES))}. "
        f"To add one, write slimdiff/families/<family>.py as in families/unet.py"
    )


def groups_of(denoiser: nn.Module) -> list[Group]:
    """The groups of `denoiser`: what can shrink, with its present widths.

    Raises:
        SlimdiffError: the class is unknown, or a layer is fused, adapted or quantised.
    """
    return resolve(denoiser, family_of(denoiser))
