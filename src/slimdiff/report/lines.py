"""The report's lines: error by width, by timestep and by number of calibration prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from slimdiff.report import numbers
from slimdiff.report.facts import Group, groups_of, kinds_of, measured, widths_told
from slimdiff.report.html import Html
from slimdiff.report.names import kind_colour, kind_name
from slimdiff.report.svg import COLOURS, Tooltips, drawn
from slimdiff.results import Results

ERROR_FLOOR = 1e-12  # below it a log axis shows rounding
MANY = 40  # curves that would hide one another
FEW_DECADES, NARROW = 2.2, 5  # decades, and a ratio, of an axis
SMALL, LARGE = (340, 280), (430, 250)  # CSS pixels: three and two in a row
IN_HALVES = (1, 2, 4)  # numbers of charts that fill rows of two better than rows of three


def curves(results: Results) -> dict[str, Html]:
    """Kind -> predicted error of its groups by the share of their width, and the chosen ones."""
    groups = groups_of(results)
    drawable: dict[str, list[Group]] = {}
    for kind in kinds_of(groups):
        mine = [group for group in groups if group["kind"] == kind and group.get("curve")]
        if mine := [group for group in mine if max(group["curve"]["errors"]) > ERROR_FLOOR]:
            drawable[kind] = mine
    size = LARGE if len(drawable) in IN_HALVES else SMALL
    kinds = kinds_of(groups)
    return {
        kind: _curves(kind, mine, COLOURS[kind_colour(kind, kinds)], size)
        for kind, mine in drawable.items()
    }


def _curves(kind: str, mine: Sequence[Group], colour: str, size: tuple[int, int]) -> Html:
    alpha = 0.55 if len(mine) < MANY else 0.25

    def paint(figure: Any) -> Tooltips:
        axis = log_axis(figure)
        tooltips: dict[str, str] = {}
        for number, group in enumerate(mine):
            tooltips |= _curve(axis, group, (colour, alpha), number)
        label_errors(axis)
        axis.set_xlim(0, 1.03)
        axis.xaxis.set_major_formatter(lambda share, _: numbers.percent(share))
        axis.set_xlabel("share of the dense width")
        return tooltips

    label = f"Velocity error, predicted, by width of {len(mine)} groups: {kind_name(kind)}"
    return drawn(f"curves-{kind}", label, size, paint)


def _curve(axis: Any, group: Group, colour: tuple[str, float], number: int) -> dict[str, str]:
    """A line, and a dot at the chosen width if there is an error to show."""
    widths, errors = group["curve"]["widths"], group["curve"]["errors"]
    shares = [width / group["dense_width"] for width in widths]
    seen = [error if error > ERROR_FLOOR else math.nan for error in errors]
    line, dot = f"l{number}", f"d{number}"
    axis.plot(shares, seen, color=colour, linewidth=1.3, gid=line)
    dense, slim = widths_told(group)
    tooltips = {line: f"{group['name']}: {slim} of {dense}"}
    if (chosen := _at(widths, errors, group["width"])) > ERROR_FLOOR:
        share = group["width"] / group["dense_width"]
        axis.plot([share], [chosen], "o", markersize=4.5, color=colour[0], gid=dot)
        tooltips[dot] = f"{tooltips[line]}, error {numbers.error(chosen)}"
    return tooltips


def _at(widths: Sequence[float], errors: Sequence[float], width: float) -> float:
    """The error at a width, on a straight line between the two nearest."""
    points = sorted(zip(widths, errors))
    if not points[0][0] <= width <= points[-1][0]:
        return math.nan
    (low, before), (high, after) = next(
        (a, b) for a, b in zip(points, points[1:] + points[-1:]) if a[0] <= width <= b[0]
    )
    return before if high == low else before + (after - before) * (width - low) / (high - low)


def by_timestep(results: Results) -> Html | None:
    """Velocity error along the denoising trajectory, from noise to image."""
    points = measured(results, "fidelity", "velocity", "by_timestep") or []

    def finish(axis: Any) -> None:
        axis.invert_xaxis()
        axis.set_xlabel("timestep, from noise to image")

    return _line("timesteps", "Velocity error by timestep", points, finish)


def by_prompts(results: Results) -> Html | None:
    """Velocity error by the number of calibration prompts."""
    rows = results.get("prompt_counts") or []
    points = sorted((row["prompts"], row["velocity_error"]) for row in rows)

    def finish(axis: Any) -> None:
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks([count for count, _ in points], [f"{count}" for count, _ in points])
        axis.set_xlabel("calibration prompts")

    return _line("prompts", "Velocity error by number of calibration prompts", points, finish)


def _line(
    prefix: str, label: str, points: Sequence[Sequence[float]], finish: Callable[[Any], None]
) -> Html | None:
    """A line through the points that a log axis can show; None if there is none."""
    seen = [(x, y) for x, y in points if y > ERROR_FLOOR]

    def paint(figure: Any) -> Tooltips:
        axis = log_axis(figure)
        axis.plot(*zip(*seen), color=COLOURS["accent"], linewidth=1.6)
        tooltips = {}
        for number, (x, y) in enumerate(seen):
            gid = f"p{number}"
            axis.plot([x], [y], "o", markersize=4, color=COLOURS["accent"], gid=gid)
            tooltips[gid] = f"{x:g}: {numbers.error(y)}"
        label_errors(axis)
        finish(axis)
        return tooltips

    return drawn(prefix, label, LARGE, paint) if seen else None


def log_axis(figure: Any) -> Any:
    """An axis for errors."""
    axis = figure.subplots()
    axis.set_yscale("log")
    axis.minorticks_off()
    axis.spines["bottom"].set_color(COLOURS["muted"])
    return axis


def label_errors(axis: Any) -> None:
    """Label decades of a log axis, and parts of them where there are few."""
    low, high = axis.get_ylim()
    if high / low < NARROW:
        low, high = axis.set_ylim(low / 2, high * 2)
    few = math.log10(high / low) < FEW_DECADES
    axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if few else (1,), numticks=9)
    axis.yaxis.set_major_formatter(lambda value, _: numbers.error(value).replace(".0e", "e"))
