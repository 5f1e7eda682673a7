"""From groups, costs and error curves to units, and from chosen sizes back to a plan."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from slimdiff import allocate
from slimdiff.budget import Budget
from slimdiff.bundles import Allocation, Bundle, untied_layers
from slimdiff.config import Recipe
from slimdiff.costs import Costs
from slimdiff.curves import ErrorCurve
from slimdiff.errors import SlimdiffError
from slimdiff.groups import Group
from slimdiff.importances import importances
from slimdiff.plan import Entry, Plan
from slimdiff.prices import (
    Prices,
    ascending,
    counts,
    offered,
    remaining,
    smallest_count,
    times,
)
from slimdiff.profile import Profile
from slimdiff.statistics import Statistics

logger = logging.getLogger(__name__)


def make_plan(
    denoiser: str,
    groups: Sequence[Group],
    costs: Costs,
    curves: Mapping[str, ErrorCurve],
    statistics: Statistics,
    budget: Budget,
    recipe: Recipe,
    allocation: Allocation,
    *,
    fused: Sequence[str] = (),
    profile: Profile | None = None,
    limit: int | None = None,
    largest_error: float | None = None,
) -> Plan:
    """The plan that meets the budget.

    Args:
        denoiser, groups, costs, curves, statistics, budget, recipe, allocation: what it is of.
        fused: the upsamplers that will be fused; the costs are with these.
        profile: times of the layers, where the budget is a time.
        limit: what may stay, instead of the budget's own limit.
        largest_error: predicted error that may not be exceeded, instead of a limit.

    Raises:
        SlimdiffError: the budget is below what the smallest widths need, or the recipe and the
            allocation do not go together.
    """
    if limit is None and largest_error is None:
        limit = check_budget(groups, costs, budget, recipe, allocation)
    prices = counts(costs, budget.metric) if profile is None else times(profile)
    total = remaining(costs, budget.metric) if profile is None else profile.remaining_nanoseconds
    bundles = offered(groups, recipe, allocation, curves, prices)
    units = [_unit(bundle, prices, curves, statistics, allocation) for bundle in bundles]
    if limit is None:
        assert largest_error is not None
        chosen = allocate.within_error(units, largest_error)
    else:
        fixed = total - sum(unit.costs[-1] for unit in units)
        chosen = _solve(units, limit - fixed, allocation)
    sizes = [bundle.sizes[index] for bundle, index in zip(bundles, chosen, strict=True)]
    entries = {
        group.name: bundle.entry(group, size)
        for bundle, size in zip(bundles, sizes, strict=True)
        for group in bundle.groups
    }
    figures = counted(groups, costs, entries, fused)
    if allocation.name == "probed":
        figures["predicted_error"] = sum(curves[name].of(entry) for name, entry in entries.items())
    told = budget.describe()
    return Plan(denoiser, recipe.name, entries, allocation.name, told, figures, list(fused))


def by_hand(plan: Plan, groups: Sequence[Group], costs: Costs) -> Plan:
    """A plan that was passed in, with figures of its own widths.

    Raises:
        SlimdiffError: it is of another denoiser.
    """
    plan.check(groups)
    figures = counted(groups, costs, plan.entries, plan.fused)
    return replace(plan, allocation="by hand", budget="--plan", figures=figures)


def refuse_unfit(
    budget: Budget, recipe: Recipe, allocation: Allocation, groups: Sequence[Group] = ()
) -> None:
    """Refuse settings that do not go together, or with the groups of a slim denoiser.

    Raises:
        SlimdiffError: names them, and what goes.
    """
    if recipe.heads and allocation.name == "probed":
        raise SlimdiffError(
            f"recipe {recipe.name} removes whole heads, which have no error curve to probe; "
            f"choose the allocation threshold, uniform or entropic"
        )
    if allocation.block_kinds is not None and allocation.name != "probed":
        raise SlimdiffError(
            f"block_kinds is {allocation.block_kinds}, but the allocation {allocation.name} sorts "
            f"no blocks; choose the allocation probed, or leave it out"
        )
    if budget.metric == "latency" and (recipe.heads or not allocation.tied):
        raise SlimdiffError(
            f"{budget.describe()}: layers are timed at tied widths; choose another recipe than "
            f"magnitude, and leave --untied out"
        )
    if budget.metric == "latency" and (apart := untied_layers(groups)):
        raise SlimdiffError(
            f"{budget.describe()}: layers are timed at tied widths, but {min(apart)} was slimmed "
            f"untied already; ask for --macs, or start from the dense model"
        )
    if budget.largest_error is not None and allocation.name != "probed":
        raise SlimdiffError(
            f"{budget.describe()} needs predicted errors; choose the allocation probed"
        )


def check_budget(
    groups: Sequence[Group], costs: Costs, budget: Budget, recipe: Recipe, allocation: Allocation
) -> int:
    """The count that may stay, if that is possible; nothing needs to be measured for it.

    Raises:
        SlimdiffError: the budget is below the smallest possible.
    """
    metric, total = budget.metric, costs.total(budget.metric)
    smallest = smallest_count(groups, costs, metric, recipe, allocation)
    limit = budget.limit(total)
    if limit < smallest:
        raise SlimdiffError(
            f"{budget.describe()} leaves {limit:,} {metric}, but the smallest possible is "
            f"{smallest:,} of {total:,} ({math.ceil(1000 * smallest / total) / 1000:.3f}): "
            f"{_advice(budget, total - smallest)}"
        )
    if limit > total:
        logger.warning(
            "warning: %s allows %s %s and there are %s: nothing has to go",
            *(budget.describe(), f"{limit:,}", metric, f"{total:,}"),
        )
    return limit


def _advice(budget: Budget, removable: int) -> str:
    if budget.remove is not None:
        return f"at most {removable:,} can go"
    return "ask for at least that"


def _unit(
    bundle: Bundle,
    prices: Prices,
    curves: Mapping[str, ErrorCurve],
    statistics: Statistics,
    allocation: Allocation,
) -> allocate.Unit:
    groups = bundle.groups
    return allocate.Unit(
        name=groups[0].layer,
        sizes=[size.inner for size in bundle.sizes],
        costs=ascending([prices(bundle, size) for size in bundle.sizes]),
        errors=[bundle.error(size, curves) for size in bundle.sizes]
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


def counted(
    groups: Sequence[Group], costs: Costs, entries: Mapping[str, Entry], fused: Sequence[str]
) -> dict[str, Any]:
    """Parameters, MACs and bytes, dense and slim, of a denoiser with these entries; what else
    changed."""
    figures: dict[str, Any] = {}
    for metric in ("params", "macs", "bytes"):
        saved = sum(
            costs.groups[group.name].of(metric, group.inner)
            - costs.groups[group.name].of(metric, _inner(entries, group))
            for group in groups
        )
        figures[f"{metric}_dense"] = costs.total(metric)
        figures[metric] = remaining(costs, metric) - saved
    if gone := {group.layer for group in groups if not _inner(entries, group)}:
        figures["layers_removed"] = len(gone)
    values = [g for g in groups if g.kind == "value_output" and g.layer not in gone]
    if heads := sum(g.heads - entries[g.name].heads for g in values if g.name in entries):
        figures["heads_removed"] = heads
    if fused:
        figures["upsamplers_fused"] = len(fused)
    return figures


def _inner(entries: Mapping[str, Entry], group: Group) -> int:
    entry = entries.get(group.name)
    return group.inner if entry is None else entry.heads * entry.width
