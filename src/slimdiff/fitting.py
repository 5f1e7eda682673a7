"""Fitting: plans for budgets that can only be measured, a time or an error.

The allocation works with predictions. Here the plan is made, what it really gives is measured, and
the allocation is repeated with the budget moved by what was missed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from slimdiff.curves import ErrorCurve
from slimdiff.errors import SlimdiffError
from slimdiff.evaluate.latency import enough_runs, interleaved, seconds_of
from slimdiff.groups import Group
from slimdiff.layer_timing import calling, narrowed
from slimdiff.plan import Plan
from slimdiff.probing import Probed
from slimdiff.shapes import slim_config
from slimdiff.statistics import Statistics
from slimdiff.swapping import Swaps

TOLERANCE = 0.03
"""Share by which a measured speed-up may miss what was asked."""

SLACK = 0.7
"""Share of the largest error from which on a plan is taken."""

ROUNDS = 8

FLATTEST = 0.25
"""Least slope of measured over predicted errors, in logarithms, that the search believes."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timed:
    """Seconds of one call, dense and slim, in one run."""

    dense: float
    slim: float
    speedup: float


def timed(
    denoiser: nn.Module, groups: Sequence[Group], plan: Plan, call: Mapping[str, Any]
) -> Timed:
    """Dense against slim, in turn; the slim denoiser has the plan's shapes and random weights."""
    device = next(denoiser.parameters()).device
    slim = narrowed(denoiser, slim_config(denoiser, groups, plan.entries, plan.fused))
    calls = {"dense": calling(denoiser, (), call), "slim": calling(slim, (), call)}
    runs = enough_runs(seconds_of(calls["dense"], device))
    found = interleaved(calls, runs=runs, device=device)
    dense, own = found["dense"], found["slim"]
    return Timed(dense.median, own.median, dense.speedup_of(own))


def fit_speedup(
    make: Callable[[int], Plan],
    time: Callable[[Plan], Timed],
    dense: int,
    least: int,
    wanted: float,
) -> Plan:
    """The plan whose measured speed-up is `wanted`, within `TOLERANCE`.

    A plan that is fast enough is measured again, and the slower of both counts: the search stops
    where luck is likely.

    Args:
        make: limit in nanoseconds -> plan.
        time: measures a plan.
        dense: nanoseconds of the dense call, in the profile.
        least: nanoseconds at the smallest widths, as the profile predicts.
        wanted: times faster.

    Raises:
        SlimdiffError: no plan is fast enough; says the best that was measured.
    """
    limit, best = max(dense / wanted, least), 0.0
    close: list[tuple[float, Plan]] = []
    for _ in range(ROUNDS):
        plan = make(math.ceil(limit))
        found = time(plan)
        if found.speedup >= (1 - TOLERANCE) * wanted:
            found = min(found, time(plan), key=lambda timed: timed.speedup)
        plan.figures["latency"] = vars(found) | {"wanted": wanted}
        best = max(best, found.speedup)
        logger.info("asked %.2f times, measured %.2f", wanted, found.speedup)
        missed = found.speedup / wanted
        if missed >= 1 - TOLERANCE:
            close.append((found.speedup, plan))
        if abs(missed - 1) <= TOLERANCE or (missed < 1 and limit <= least):
            break
        limit = max(least, min(dense, limit * missed))
    if not close:
        raise SlimdiffError(
            f"{wanted:.2f} times faster is out of reach here: the fastest that was measured is "
            f"{best:.2f} times; ask for that, or let more shrink (--layers, a smaller --multiple)"
        )
    return min(close, key=lambda pair: pair[0])[1]


def fit_error(
    make: Callable[[float], Plan], measure: Callable[[Plan], float], largest: float
) -> Plan:
    """The cheapest plan that was found whose measured error is at most `largest`.

    Args:
        make: largest predicted error -> plan.
        measure: error of a plan on the probes.
        largest: what may be lost.

    Raises:
        SlimdiffError: none was found; says the least error that was measured.
    """
    goal, found, tried = largest, [], []
    for _ in range(ROUNDS):
        plan = make(goal)
        error = measure(plan)
        tried.append((goal, error))
        plan.figures["measured_error"] = error
        logger.info("predicted %.2e, measured %.2e", goal, error)
        found.append((error, plan))
        if SLACK * largest <= error <= largest or error == 0.0:
            break
        goal = _next_goal(tried, largest)
    good = [pair for pair in found if pair[0] <= largest]
    if not good:
        least = min(error for error, _ in found)
        raise SlimdiffError(
            f"quality {largest:g} is out of reach: the least error that was measured is {least:.2e}"
        )
    return max(good, key=lambda pair: pair[0])[1]


def _next_goal(tried: Sequence[tuple[float, float]], largest: float) -> float:
    """The prediction to ask for next, by the secant of measured over predicted in logarithms."""
    goal, error = tried[-1]
    slope = 1.0
    if len(tried) > 1 and tried[-2][0] != goal and tried[-2][1] > 0:
        rise = math.log(error / tried[-2][1]) / math.log(goal / tried[-2][0])
        slope = min(max(rise, FLATTEST), 1.0)
    return goal * (0.95 * largest / error) ** (1 / slope)


def measured_error(
    probes: Probed,
    groups: Sequence[Group],
    statistics: Statistics,
    plan: Plan,
    curves: Mapping[str, ErrorCurve],
) -> float:
    """Velocity error of a plan on the probes, with nothing rewritten.

    All groups shrink together: their dense-size weights that behave as the slim ones are swapped in
    for one run.
    """
    swaps = Swaps(probes.denoiser, groups, statistics, curves)
    return probes.error(swaps.joined(swaps.of(plan).values()))
