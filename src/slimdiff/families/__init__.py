"""Model families: one data file each. Every module in this folder defines `FAMILY`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from slimdiff.errors import SlimdiffError
from slimdiff.groups import LAYERS, Family, Group
from slimdiff.resolve import resolve


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
    """The family of `denoiser`: what its class says in `slimdiff_family`, or else the one that is
    known by the name of its class or of the nearest base class.

    Raises:
        SlimdiffError: no family describes it; the error lists what is known.
    """
    own = getattr(type(denoiser), "slimdiff_family", None)
    if isinstance(own, Family):
        return own
    for base in type(denoiser).__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
    raise SlimdiffError(
        f"no family describes {type(denoiser).__name__}; known: {', '.join(sorted(FAMILIES))}. "
        f"To add one, write its data on the class, as docs/add-your-model.md shows"
    )


def groups_of(denoiser: nn.Module, layers: Sequence[str] | None = None) -> list[Group]:
    """The groups of `denoiser`: what can shrink, with its present widths.

    Args:
        denoiser: of a known family.
        layers: only those of these layers: `attention`, `feed_forward`, `resnet`; all by default.

    Raises:
        SlimdiffError: the class is unknown; a layer is fused, adapted or quantised; `layers` names
            none that there is.
    """
    groups = [_of_dense(denoiser, group) for group in resolve(denoiser, family_of(denoiser))]
    if layers is None:
        return groups
    if strange := sorted(set(layers) - set(LAYERS.values())):
        known = ", ".join(dict.fromkeys(LAYERS.values()))
        raise SlimdiffError(f"unknown layers {', '.join(strange)}; expected some of {known}")
    chosen = [group for group in groups if LAYERS[group.kind] in layers]
    if not chosen:
        raise SlimdiffError(f"{type(denoiser).__name__} has no layer of {', '.join(layers)}")
    return chosen


def _of_dense(denoiser: nn.Module, group: Group) -> Group:
    """The group with its dense width, which a slim denoiser's plan tells."""
    record = getattr(denoiser, "slim_record", None)
    entry = None if record is None else record.plan.entries.get(group.name)
    return group if entry is None else replace(group, dense_width=entry.dense_width)
