"""From groups, costs and error curves to units, and from chosen sizes back to a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimdiff import allocate
from slimdiff.config import Budget, Recipe
from slimdiff.costs import Costs
from slimdiff.curves import ErrorCurve
from slimdiff.errors import SlimdiffError
from slimdiff.groups import Group
from slimdiff.plan import Entry, Plan
from slimdiff.recipes import importances
from slimdiff.statistics import Statistics


@dataclass(frozen=True)
class Allocation:
    """How widths are chosen: the allocator, tying, the multiple and the entropic temperature."""

    name: str
    tied: bool = True
    multiple: int = 8
    temperature: float = 0.3

    def __post_init__(self) -> None:
        if self.name not in ("probed", "entropic", "uniform", "threshold"):
            raise SlimdiffError(
                f"unknown allocation {self.name!r}; known: probed, entropic, uniform, threshold"
            )
        if self.multiple < 1:
            raise SlimdiffError(f"multiple must be at least 1, got {self.multiple}")


@dataclass(frozen=True)
class _Bundle:
    """Groups that share one size, with what a size means for them."""

    groups: tuple[Group, ...]
    by_heads: bool
    sizes: list[int]

    def inner(self, group: Group, size: int) -> int:
        return size * (group.width if self.by_heads else group.heads)

    def entry(self, group: Group, size: int) -> Entry:
        width, heads = (group.width, size) if self.by_heads else (size, group.heads)
        return Entry(group.kind, width, group.width, heads, group.heads)


def make_plan(
    denoiser: str,
    groups: Sequence[Group],
    costs: Costs,
    curves: Mapping[str, ErrorCurve],
    statistics: Statistics,
    budget: Budget,
    recipe: Recipe,
    allocation: Allocation,
) -> Plan:
    """The plan that meets the budget.

    Raises:
        SlimdiffError: the budget is below what the smallest widths need, or the recipe and the
            allocation do not go together.
    """
    bundles = _bundles(groups, recipe, allocation)
    units = [_unit(bundle, costs, curves, statistics, budget, allocation) for bundle in bundles]
    limit = check_budget(groups, costs, budget, recipe, allocation)
    fixed = costs.total(budget.metric) - sum(unit.costs[-1] for unit in units)
    sizes = [
        unit.sizes[index]
        for unit, index in zip(units, _solve(units, limit - fixed, allocation), strict=True)
    ]
    entries = {
        group.name: bundle.entry(group, size)
        for bundle, size in zip(bundles, sizes, strict=True)
        for group in bundle.groups
    }
    figures = counted(groups, costs, entries)
    if allocation.name == "probed":
        figures["predicted_error"] = sum(
            curves[name].at(entry.width) for name, entry in entries.items()
        )
    return Plan(denoiser, recipe.name, entries, allocation.name, budget.describe(), figures)


def check_budget(
    groups: Sequence[Group], costs: Costs, budget: Budget, recipe: Recipe, allocation: Allocation
) -> int:
    """The count that may stay, if that is possible; nothing needs to be measured for it.

    Raises:
        SlimdiffError: the budget is below the smallest possible, or the recipe and the allocation
            do not go together.
    """
    if recipe.heads and allocation.name == "probed":
        raise SlimdiffError(
            f"recipe {recipe.name} removes whole heads, which have no error curve to probe; "
            f"choose the allocation threshold, uniform or entropic"
        )
    metric, total = budget.metric, costs.total(budget.metric)
    limit, smallest = budget.limit(total), total
    for bundle in _bundles(groups, recipe, allocation):
        spare = bundle.sizes[-1] - bundle.sizes[0]
        smallest -= sum(
            costs.groups[group.name].of(metric, bundle.inner(group, spare))
            for group in bundle.groups
        )
    if limit < smallest:
        raise SlimdiffError(
            f"{budget.describe()} leaves {limit:,} {metric}, but the smallest possible is "
            f"{smallest:,} of {total:,} ({math.ceil(1000 * smallest / total) / 1000:.3f}): "
            f"{_advice(budget, total - smallest)}"
        )
    return limit


def _advice(budget: Budget, removable: int) -> str:
    if budget.remove is not None:
        return f"at most {removable:,} can go"
    return "ask for at least that"


def _bundles(groups: Sequence[Group], recipe: Recipe, allocation: Allocation) -> list[_Bundle]:
    together: dict[str, list[Group]] = {}
    for group in groups:
        tied = allocation.tied or recipe.heads
        together.setdefault(group.layer if tied else group.name, []).append(group)
    bundles = []
    for members in together.values():
        by_heads = recipe.heads and members[0].kind != "feed_forward"
        dense = members[0].heads if by_heads else members[0].width
        sizes = allocate.allowed_sizes(dense, 1 if by_heads else allocation.multiple)
        bundles.append(_Bundle(tuple(members), by_heads, sizes))
    return bundles


def _unit(
    bundle: _Bundle,
    costs: Costs,
    curves: Mapping[str, ErrorCurve],
    statistics: Statistics,
    budget: Budget,
    allocation: Allocation,
) -> allocate.Unit:
    groups = bundle.groups
    return allocate.Unit(
        name=groups[0].layer,
        sizes=bundle.sizes,
        costs=[
            sum(costs.groups[g.name].of(budget.metric, bundle.inner(g, size)) for g in groups)
            for size in bundle.sizes
        ],
        errors=[sum(curves[g.name].at(size) for g in groups) for size in bundle.sizes]
        if allocation.name == "probed"
        else (),
        score=float(statistics.mean(f"{groups[0].block}/influence"))
        if allocation.name == "entropic"
        else 0.0,
        importances=importances(groups[-1], statistics).tolist()
        if allocation.name == "threshold"
        else (),
    )


def _solve(units: Sequence[allocate.Unit], limit: int, allocation: Allocation) -> list[int]:
    if allocation.name == "probed":
        return allocate.lagrangian(units, limit)
    if allocation.name == "entropic":
        return allocate.entropic(units, limit, allocation.temperature)
    if allocation.name == "uniform":
        return allocate.uniform(units, limit)
    return allocate.threshold(units, limit)


def counted(groups: Sequence[Group], costs: Costs, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Parameters and MACs, dense and slim, of a denoiser with these entries."""
    figures: dict[str, Any] = {}
    for metric in ("params", "macs"):
        saved = sum(
            costs.groups[group.name].of(metric, group.heads * group.width - _inner(entries, group))
            for group in groups
        )
        dense = costs.total(metric)
        figures |= {f"{metric}_dense": dense, metric: dense - saved}
    return figures


def _inner(entries: Mapping[str, Entry], group: Group) -> int:
    entry = entries.get(group.name)
    return group.heads * group.width if entry is None else entry.heads * entry.width
