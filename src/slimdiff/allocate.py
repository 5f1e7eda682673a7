"""Allocation: widths for all units under a budget. Numbers in, numbers out.

A unit is what gets one width: a group, or the tied halves of an attention layer. Each allocator
returns the index of the chosen size of every unit; the chosen cost never exceeds the limit, and no
further step up that is not predicted to lose more would fit.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from slimdiff.errors import SlimdiffError


@dataclass(frozen=True)
class Unit:
    """One thing that gets a size.

    Attributes:
        name: for messages.
        sizes: inner channels at each allowed size, by cost; the last is the dense one.
        costs: cost at each size, strictly ascending.
        errors: predicted error of the denoiser's output at each size (probed allocation).
        score: influence of the unit's block (entropic allocation).
        importances: importance of every head or hidden unit, relative to the most important of
            its layer (threshold allocation).
    """

    name: str
    sizes: Sequence[int]
    costs: Sequence[int]
    errors: Sequence[float] = ()
    score: float = 0.0
    importances: Sequence[float] = ()


Choice = list[int]


def lagrangian(units: Sequence[Unit], limit: int) -> Choice:
    """Minimise the sum of errors subject to the sum of costs.

    The minimisers of error + lambda * cost are the vertices of each unit's lower convex hull; as
    lambda falls they are visited in the order of their slopes, so one pass over the sorted hull
    segments takes the place of a bisection on lambda.

    Raises:
        SlimdiffError: even the smallest sizes exceed `limit`.
    """
    choice = _smallest(units, limit)
    spent = _cost(units, choice)
    segments = sorted(
        (
            (-slope, u, end)
            for u, unit in enumerate(units)
            for slope, end in _hull_segments(unit.costs, unit.errors)
        ),
    )
    for _, u, end in segments:
        step = units[u].costs[end] - units[u].costs[choice[u]]
        if end > choice[u] and spent + step <= limit:
            choice[u], spent = end, spent + step
    return _fill(units, choice, limit, _error_per_cost, _no_worse)


def within_error(units: Sequence[Unit], largest: float) -> Choice:
    """The least cost whose summed error is at most `largest`, by bisection on the cost.

    Raises:
        SlimdiffError: even the dense sizes exceed it.
    """
    low, high = sum(unit.costs[0] for unit in units), sum(unit.costs[-1] for unit in units)
    if _error(units, [len(unit.sizes) - 1 for unit in units]) > largest:
        raise SlimdiffError(f"an error of {largest:.2e} is below what rounding alone makes")
    while low < high:
        middle = (low + high) // 2
        fits = _error(units, lagrangian(units, middle)) <= largest
        low, high = (low, middle) if fits else (middle + 1, high)
    return lagrangian(units, high)


def uniform(units: Sequence[Unit], limit: int) -> Choice:
    """The same share of every unit's dense size.

    Raises:
        SlimdiffError: even the smallest sizes exceed `limit`.
    """
    return _scan(units, limit, lambda share: [share] * len(units))


def entropic(units: Sequence[Unit], limit: int, temperature: float) -> Choice:
    """Shares removed phi = n * mean * softmax(-score / temperature) (MoDeGPT, eq. 10; SlimDiff).

    `mean` is what meets the budget; a share that would pass 1 stops at the unit's smallest size.

    Raises:
        SlimdiffError: even the smallest sizes exceed `limit`, or the temperature is not positive.
    """
    if not temperature > 0:
        raise SlimdiffError(f"temperature must be positive, got {temperature}")
    lowest = min(unit.score for unit in units)
    weights = [math.exp(-(unit.score - lowest) / temperature) for unit in units]
    scale = max(min(weights), 1e-12)
    removed = [weight / scale for weight in weights]
    return _scan(units, limit, lambda x: [1 - (1 / x - 1) * r if x else 0.0 for r in removed])


def threshold(units: Sequence[Unit], limit: int) -> Choice:
    """Everything whose importance is below one global threshold goes.

    Raises:
        SlimdiffError: even the smallest sizes exceed `limit`.
    """
    ascending = [sorted(unit.importances) for unit in units]

    def shares(x: float) -> list[float]:
        tau = 1 - x
        return [
            (len(values) - bisect_right(values, tau)) / len(values) if x < 1 else 1.0
            for values in ascending
        ]

    return _scan(units, limit, shares)


def _scan(
    units: Sequence[Unit], limit: int, shares: Callable[[float], list[float]], steps: int = 60
) -> Choice:
    """Largest x in [0, 1] whose shares fit, by bisection (cost rises with x), then filled up."""
    _smallest(units, limit)
    low, high = 0.0, 1.0
    if _cost(units, _rounded(units, shares(high))) <= limit:
        return _rounded(units, shares(high))
    for _ in range(steps):
        middle = (low + high) / 2
        fits = _cost(units, _rounded(units, shares(middle))) <= limit
        low, high = (middle, high) if fits else (low, middle)
    kept = shares(low)

    def lost_share(unit: Unit, u: int, index: int, _end: int) -> float:
        return kept[u] - unit.sizes[index] / unit.sizes[-1]

    return _fill(units, _rounded(units, kept), limit, lost_share, _next)


def _rounded(units: Sequence[Unit], shares: Sequence[float]) -> Choice:
    return [
        max(0, bisect_right(unit.sizes, share * unit.sizes[-1] + 1e-9) - 1)
        for unit, share in zip(units, shares, strict=True)
    ]


def _fill(
    units: Sequence[Unit],
    choice: Choice,
    limit: int,
    gain: Callable[[Unit, int, int, int], float],
    following: Callable[[Unit, int], int | None],
) -> Choice:
    """Take steps up, the largest gain first, until none fits.

    Args:
        units, choice, limit: what is chosen so far, and what may be spent.
        gain: of a unit, its number, from one index to another.
        following: the index that is a step up from another; None if there is none.
    """
    choice = list(choice)
    spent = _cost(units, choice)
    while True:
        steps = [
            (gain(unit, u, index, end), u, end)
            for u, (unit, index) in enumerate(zip(units, choice, strict=True))
            if (end := following(unit, index)) is not None
            and spent + unit.costs[end] - unit.costs[index] <= limit
        ]
        if not steps:
            return choice
        _, u, end = max(steps)
        spent += units[u].costs[end] - units[u].costs[choice[u]]
        choice[u] = end


def _next(unit: Unit, index: int) -> int | None:
    return index + 1 if index + 1 < len(unit.sizes) else None


def _no_worse(unit: Unit, index: int) -> int | None:
    """The next size that loses no more: a layer that went may lose less than one that is narrow."""
    larger = range(index + 1, len(unit.sizes))
    return next((end for end in larger if unit.errors[end] <= unit.errors[index]), None)


def _error_per_cost(unit: Unit, _u: int, index: int, end: int) -> float:
    saved = unit.errors[index] - unit.errors[end]
    return saved / (unit.costs[end] - unit.costs[index])


def _smallest(units: Sequence[Unit], limit: int) -> Choice:
    choice = [0] * len(units)
    if (least := _cost(units, choice)) > limit:
        raise SlimdiffError(
            f"the budget leaves {limit:,} for the groups, but the smallest allowed widths need "
            f"{least:,}"
        )
    return choice


def _cost(units: Sequence[Unit], choice: Choice) -> int:
    return sum(unit.costs[index] for unit, index in zip(units, choice, strict=True))


def _error(units: Sequence[Unit], choice: Choice) -> float:
    return sum(unit.errors[index] for unit, index in zip(units, choice, strict=True))


def _hull_segments(costs: Sequence[int], errors: Sequence[float]) -> list[tuple[float, int]]:
    """Segments of the lower convex hull of (cost, error): (error saved per cost, end index)."""
    hull: list[int] = []
    for i in range(len(costs)):
        while len(hull) > 1 and _slope(costs, errors, hull[-2], hull[-1]) <= _slope(
            costs, errors, hull[-1], i
        ):
            hull.pop()
        hull.append(i)
    return [(_slope(costs, errors, start, end), end) for start, end in pairwise(hull)]


def _slope(costs: Sequence[int], errors: Sequence[float], start: int, end: int) -> float:
    return (errors[start] - errors[end]) / (costs[end] - costs[start])


def allowed_sizes(
    dense: int, multiple: int, step: int = 1, largest: int | None = None, origin: int = 0
) -> list[int]:
    """Sizes that a width may take: multiples of `multiple` and `step`, and the dense size; never 0.

    None between `largest` and the dense size is offered. Where fewer than four multiples fit (eight
    if there is a `step`), `multiple` is halved until they do; `step` always holds. A layer that is
    slim already goes on with the multiples of its `origin`, the width that it had at first.
    """
    fewest = 4 if step == 1 else 8
    while multiple > 1 and max(dense, origin) < fewest * math.lcm(multiple, step):
        multiple //= 2
    common = math.lcm(multiple, step)
    end = dense if largest is None else min(dense, largest + 1)
    return [*range(common, end, common), dense]
