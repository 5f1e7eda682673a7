"""Bundles: groups that share one size, by how widths are to be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimdiff import allocate
from slimdiff.config import Recipe
from slimdiff.errors import SlimdiffError
from slimdiff.groups import LAYERS, Group
from slimdiff.plan import Entry


@dataclass(frozen=True)
class Allocation:
    """How widths are chosen: the allocator, tying, the multiple and the entropic temperature.

    `removable` holds the paths of layers that may go wholly (size 0), as far as they are bundles.
    """

    name: str
    tied: bool = True
    multiple: int = 8
    temperature: float = 0.3
    removable: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.name not in ("probed", "entropic", "uniform", "threshold"):
            raise SlimdiffError(
                f"unknown allocation {self.name!r}; known: probed, entropic, uniform, threshold"
            )
        if self.multiple < 1:
            raise SlimdiffError(f"multiple must be at least 1, got {self.multiple}")


@dataclass(frozen=True)
class Bundle:
    """Groups that share one size, with what a size means for them."""

    groups: tuple[Group, ...]
    by_heads: bool
    sizes: list[int]

    def inner(self, group: Group, size: int) -> int:
        """Inner channels of one of the groups at a size."""
        return size * (group.width if self.by_heads else group.heads)

    def entry(self, group: Group, size: int) -> Entry:
        """What a size means for one of the groups."""
        width, heads = (group.width, size) if self.by_heads else (size, group.heads)
        return Entry(group.kind, width, group.width, heads, group.heads)


def bundles_of(groups: Sequence[Group], recipe: Recipe, allocation: Allocation) -> list[Bundle]:
    """All groups that may shrink, those together that get one size.

    Whole heads can only go where queries and keys may lose theirs too, and one by one. Halves of
    an attention layer whose widths differ already stay apart.
    """
    together: dict[str, list[Group]] = {}
    apart = untied_layers(groups)
    for group in groups:
        tied = recipe.heads or group.tied or (allocation.tied and group.layer not in apart)
        together.setdefault(group.layer if tied else group.name, []).append(group)
    bundles = []
    for members in together.values():
        first = members[0]
        by_heads = recipe.heads and LAYERS[first.kind] == "attention"
        queries = any(group.kind == "query_key" for group in members)
        if by_heads and (first.fixed_heads or not queries):
            continue
        sizes = (
            allocate.allowed_sizes(first.heads, 1)
            if by_heads
            else sizes_of(first, allocation.multiple)
        )
        whole = len(members) == (2 if LAYERS[first.kind] == "attention" else 1)
        if allocation.name == "probed" and whole and first.layer in allocation.removable:
            sizes = [0, *sizes]
        bundles.append(Bundle(tuple(members), by_heads, sizes))
    return bundles


def sizes_of(group: Group, multiple: int) -> list[int]:
    """Widths that a group may take, its own the last."""
    how = (group.width, multiple, group.step, group.largest, group.dense_width)
    return allocate.allowed_sizes(*how)


def untied_layers(groups: Sequence[Group]) -> set[str]:
    """Attention layers whose values have another width than their queries that can shrink."""
    queries = {group.layer: group.width for group in groups if group.kind == "query_key"}
    return {group.layer for group in groups if queries.get(group.layer, group.width) != group.width}
