"""Prices: what every size of a bundle costs, and which sizes are offered at these prices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from slimdiff.bundles import Allocation, Bundle, Size, bundles_of, with_fewer_heads
from slimdiff.config import Recipe
from slimdiff.costs import Costs
from slimdiff.curves import ErrorCurve
from slimdiff.groups import Group
from slimdiff.profile import Profile

Prices = Callable[[Bundle, Size], int]
"""What a size of a bundle costs: parameters, MACs or nanoseconds."""


def counts(costs: Costs, metric: str) -> Prices:
    """Parameters or MACs."""

    def price(bundle: Bundle, size: Size) -> int:
        return sum(costs.groups[g.name].of(metric, bundle.inner(g, size)) for g in bundle.groups)

    return price


def remaining(costs: Costs, metric: str) -> int:
    """What the whole denoiser has while nothing shrinks."""
    return costs.total(metric) - costs.spared(metric)


def times(profile: Profile) -> Prices:
    """Nanoseconds of the whole layers."""

    def price(bundle: Bundle, size: Size) -> int:
        share = size.heads / bundle.groups[0].heads
        layers = dict.fromkeys(group.layer for group in bundle.groups)
        return round(1e9 * sum(profile.of(layer, size.width, share) for layer in layers))

    return price


def ascending(prices: Sequence[int]) -> list[int]:
    """Made strictly so: a size that costs no less than a larger one costs 1 less than that."""
    found = list(prices)
    for i in range(len(found) - 2, -1, -1):
        found[i] = min(found[i], found[i + 1] - 1)
    return found


def offered(
    groups: Sequence[Group],
    recipe: Recipe,
    allocation: Allocation,
    curves: Mapping[str, ErrorCurve],
    prices: Prices,
) -> list[Bundle]:
    """All bundles, with the sizes that may be chosen."""
    bundles = bundles_of(groups, recipe, allocation)
    if not (allocation.heads and allocation.name == "probed"):
        return bundles
    multiple = allocation.head_multiple
    return [
        with_fewer_heads(bundle, curves, functools.partial(prices, bundle), multiple)
        for bundle in bundles
    ]


def least_nanoseconds(
    groups: Sequence[Group],
    recipe: Recipe,
    allocation: Allocation,
    curves: Mapping[str, ErrorCurve],
    profile: Profile,
) -> int:
    """What a call takes at the smallest sizes, by the profile."""
    prices = times(profile)
    saved = 0
    for bundle in offered(groups, recipe, allocation, curves, prices):
        own = ascending([prices(bundle, size) for size in bundle.sizes])
        saved += own[-1] - own[0]
    return profile.remaining_nanoseconds - saved


def smallest_count(
    groups: Sequence[Group], costs: Costs, metric: str, recipe: Recipe, allocation: Allocation
) -> int:
    """What the whole denoiser has at the smallest widths of all heads.

    Where fewer heads may go is known only once curves are.
    """
    prices, smallest = counts(costs, metric), remaining(costs, metric)
    for bundle in bundles_of(groups, recipe, allocation):
        smallest -= prices(bundle, bundle.sizes[-1]) - prices(bundle, bundle.sizes[0])
    return smallest
