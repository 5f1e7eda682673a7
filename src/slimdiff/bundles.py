"""Bundles: groups that share one size, by how widths are to be chosen."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from slimdiff import allocate
from slimdiff.config import Recipe
from slimdiff.curves import ErrorCurve
from slimdiff.errors import SlimdiffError
from slimdiff.groups import LAYERS, Group
from slimdiff.plan import Entry

WORTH = 0.8
"""Share of what all heads lose at the same price, below which fewer heads are offered.

Gains are measured with all heads. Fewer ones that were predicted to lose a tenth less lost a little
more on held-out prompts of scenes-unet, at 35 % and at 50 % removed."""


@dataclass(frozen=True)
class Allocation:
    """How widths are chosen: the allocator, tying, the multiple and the entropic temperature.

    `removable` holds the paths of layers that may go wholly (size 0), as far as they are bundles;
    with `heads` whole heads may go where curves say what is lost without them; as many stay as
    divide by `head_multiple`, so that as many ranks can share them. Layers that `kept` names
    (`attention`, `projection`, ...) stay as they are. Of like blocks with attention at most
    `block_kinds` sets of widths are made (None: as many as there are blocks); `alike` says which
    layers and groups then share one, by a name for all of them.
    """

    name: str
    tied: bool = True
    multiple: int = 8
    temperature: float = 0.3
    removable: frozenset[str] = frozenset()
    heads: bool = False
    kept: frozenset[str] = frozenset()
    head_multiple: int = 1
    block_kinds: int | None = None
    alike: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in ("probed", "entropic", "uniform", "threshold"):
            raise SlimdiffError(
                f"unknown allocation {self.name!r}; known: probed, entropic, uniform, threshold"
            )
        for name in ("multiple", "head_multiple", "block_kinds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SlimdiffError(f"{name} must be at least 1, got {value}")


class Size(NamedTuple):
    """Channels per head and heads; hidden units, channels or a rank, and 1."""

    width: int
    heads: int

    @property
    def inner(self) -> int:
        """Inner channels: what parameters and MACs go by."""
        return self.width * self.heads


@dataclass(frozen=True)
class Bundle:
    """Groups that share one size, with what a size means for them.

    Attributes:
        groups: the halves of an attention layer, or one group; or those of several like layers.
        by_heads: heads keep the width of their group, whatever the size says.
        sizes: by width, or by price where there are fewer heads; the last is the dense one.
    """

    groups: tuple[Group, ...]
    by_heads: bool
    sizes: list[Size]

    def inner(self, group: Group, size: Size) -> int:
        """Inner channels of one of the groups at a size."""
        entry = self.entry(group, size)
        return entry.width * entry.heads

    def entry(self, group: Group, size: Size) -> Entry:
        """What a size means for one of the groups."""
        width = group.width if self.by_heads else size.width
        return Entry(group.kind, width, group.width, size.heads, group.heads)

    def error(self, size: Size, curves: Mapping[str, ErrorCurve]) -> float:
        """Predicted error of the denoiser's output at a size."""
        return sum(curves[group.name].of(self.entry(group, size)) for group in self.groups)


def bundles_of(groups: Sequence[Group], recipe: Recipe, allocation: Allocation) -> list[Bundle]:
    """All groups that may shrink, those together that get one size.

    Whole heads can only go where queries and keys may lose theirs too, and one by one. Halves of
    an attention layer whose widths differ already stay apart.
    """
    together: dict[str, list[Group]] = {}
    apart = untied_layers(groups)
    for group in groups:
        tied = recipe.heads or group.tied or (allocation.tied and group.layer not in apart)
        name = group.layer if tied else group.name
        together.setdefault(allocation.alike.get(name, name), []).append(group)
    bundles = []
    for members in together.values():
        first = members[0]
        by_heads = recipe.heads and LAYERS[first.kind] == "attention"
        queries = any(group.kind == "query_key" for group in members)
        if by_heads and (first.fixed_heads or not queries):
            continue
        sizes = (
            [Size(first.width, heads) for heads in _head_counts(first, allocation)]
            if by_heads
            else _widths(first, allocation.multiple)
        )
        layers = {group.layer for group in members}
        whole = len(members) == len(layers) * (2 if LAYERS[first.kind] == "attention" else 1)
        if allocation.name == "probed" and whole and layers <= allocation.removable:
            sizes = [Size(0, first.heads), *sizes]
        if LAYERS[first.kind] in allocation.kept:
            sizes = sizes[-1:]
        bundles.append(Bundle(tuple(members), by_heads, sizes))
    return bundles


def _head_counts(group: Group, allocation: Allocation) -> list[int]:
    return allocate.allowed_sizes(group.heads, 1, step=allocation.head_multiple)


def sizes_of(group: Group, multiple: int) -> list[int]:
    """Widths that a group may take, its own the last."""
    how = (group.width, multiple, group.step, group.largest, group.dense_width)
    return allocate.allowed_sizes(*how)


def untied_layers(groups: Sequence[Group]) -> set[str]:
    """Attention layers whose values have another width than their queries that can shrink."""
    queries = {group.layer: group.width for group in groups if group.kind == "query_key"}
    return {group.layer for group in groups if queries.get(group.layer, group.width) != group.width}


def _widths(group: Group, multiple: int) -> list[Size]:
    return [Size(width, group.heads) for width in sizes_of(group, multiple)]


def with_fewer_heads(
    bundle: Bundle,
    curves: Mapping[str, ErrorCurve],
    price: Callable[[Size], float],
    multiple: int = 1,
) -> Bundle:
    """The bundle, with sizes of fewer heads where these are predicted to lose less.

    Less than `WORTH` of what all heads would lose at the same price, were every width allowed (at
    least the smallest that is), and less than any cheaper size. Sizes of all heads stay, except
    those that lose more than a cheaper size of fewer heads.

    Args:
        bundle: of all heads.
        curves: errors of its groups.
        price: what a size costs.
        multiple: of this many heads.

    Returns:
        A bundle with sizes by ascending price.
    """
    groups, dense = bundle.groups, bundle.sizes[-1]
    known = [curves[group.name].by_heads or {} for group in groups]
    counts = [n for n in known[0] if n % multiple == 0 and all(n in own for own in known)]
    if len(groups) == 1 or not counts:
        return bundle
    widths = [size.width for size in bundle.sizes if size.width]
    every = [Size(width, dense.heads) for width in range(widths[0], dense.width + 1)]
    line = [(price(size), bundle.error(size, curves)) for size in every]
    found = {size: bundle.error(size, curves) for size in bundle.sizes}
    for size in (Size(width, heads) for heads in counts for width in widths):
        error = bundle.error(size, curves)
        if error < WORTH * between(line, price(size)):
            found[size] = error
    sizes: list[Size] = []
    least = least_of_fewer = math.inf
    for size in sorted(found, key=lambda size: (price(size), size.inner, found[size])):
        whole, error = size.heads == dense.heads, found[size]
        if error <= least_of_fewer if whole else error < least:
            sizes.append(size)
            least = min(least, error)
            least_of_fewer = least_of_fewer if whole else error
    return replace(bundle, sizes=sizes)


def between(line: Sequence[tuple[float, float]], place: float) -> float:
    """The second at a place among the firsts (ascending), linearly; beyond them, that of the end.

    Of several equal firsts the last one counts.
    """
    right = bisect_right(line, place, key=lambda point: point[0])
    if right in (0, len(line)):
        return line[min(right, len(line) - 1)][1]
    (a, low), (b, high) = line[right - 1], line[right]
    return low + (high - low) * (place - a) / (b - a)
