"""The frontier: predicted and measured error against size and MACs, from one calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slimdiff.plan import Plan

POINTS = 24
MEASURED = 5


@dataclass(frozen=True)
class Point:
    """One plan of the frontier.

    Attributes:
        params: that stay.
        macs: of one forward.
        predicted: velocity error, from error curves and gains.
        measured: velocity error on the probes, all groups shrunk together; None if not measured.
    """

    params: int
    macs: int
    predicted: float
    measured: float | None = None


@dataclass(frozen=True)
class Frontier:
    """Plans from the dense denoiser down to its smallest widths.

    Attributes:
        dense: parameters and MACs of the dense denoiser.
        metric: what was budgeted: `params` or `macs`.
        points: by falling size.
        knee: index of the point from which on error rises fastest for what is saved.
    """

    dense: Point
    metric: str
    points: tuple[Point, ...]
    knee: int

    def section(self) -> dict[str, Any]:
        """The section `frontier` of results."""
        return asdict(self)


def frontier(
    plan_for: Callable[[int], Plan],
    measure: Callable[[Plan], float],
    dense: int,
    smallest: int,
    metric: str,
    progress: Callable[[str, int, int], None] | None = None,
) -> Frontier:
    """Plans at `POINTS` budgets, evenly spread, `MEASURED` of them measured.

    Args:
        plan_for: limit -> plan, with parameters, MACs and the predicted error in its figures.
        measure: velocity error of a plan on the probes.
        dense, smallest: the range of the limit.
        metric: what the limit counts.
        progress: called with ("frontier", points measured, in all).
    """
    limits = [round(dense + (smallest - dense) * i / POINTS) for i in range(1, POINTS + 1)]
    plans = [plan_for(limit) for limit in limits]
    chosen = {round((i + 0.5) * (POINTS - 1) / MEASURED) for i in range(MEASURED)}
    points = []
    for i, plan in enumerate(plans):
        measured = measure(plan) if i in chosen else None
        if measured is not None and progress is not None:
            progress("frontier", sum(i >= c for c in chosen), len(chosen))
        figures = plan.figures
        points.append(
            Point(figures["params"], figures["macs"], figures["predicted_error"], measured)
        )
    whole = plans[0].figures
    start = Point(whole["params_dense"], whole["macs_dense"], 0.0, 0.0)
    sizes = [getattr(point, metric) for point in points]
    return Frontier(
        start, metric, tuple(points), knee_of(sizes, [point.predicted for point in points])
    )


def knee_of(sizes: Sequence[float], errors: Sequence[float]) -> int:
    """The point farthest below the chord of saved size and error (Satopaa et al., 2011, "Kneedle").

    Both axes are scaled to 0..1; the root of the squared error counts, which is what is seen.
    Before the knee size falls at little cost, after it the error rises steeply.

    Raises:
        ValueError: fewer than two points.
    """
    if len(sizes) < 2 or len(sizes) != len(errors):
        raise ValueError(f"a knee needs two points or more, got {len(sizes)} and {len(errors)}")
    roots = [math.sqrt(max(error, 0.0)) for error in errors]
    x = [(sizes[0] - size) / max(sizes[0] - sizes[-1], 1e-300) for size in sizes]
    y = [(root - roots[0]) / max(roots[-1] - roots[0], 1e-300) for root in roots]
    return max(range(len(sizes)), key=lambda i: x[i] - y[i])
