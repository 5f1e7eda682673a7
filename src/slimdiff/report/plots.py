"""The report's bars: where parameters and MACs went, and the plan as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slimdiff.report import facts, numbers
from slimdiff.report.facts import Group, Pair
from slimdiff.report.html import Html
from slimdiff.report.names import METRICS, UNITS, kind_colour, kind_name
from slimdiff.report.svg import COLOURS, Tooltips, drawn
from slimdiff.results import Results

WIDE = 1040  # CSS pixels: fills the page
PALE = 0.3
BAR, ROOM = 0.38, 22  # height of a bar in rows, and of a row in pixels
LETTER = 7  # CSS pixels of a label
LEAST_ROOM = 2  # bars; a part of the network that has fewer gets as much room, for its name


def where_it_went(results: Results, metric: str) -> Html:
    """Dense and slim bars, stacked by kind: of the whole denoiser, and of each block."""
    groups = facts.groups_of(results)
    rest = facts.rest_of(results, metric)
    kind_of, places = [group["kind"] for group in groups], facts.places_of(groups)
    by_place: dict[str, dict[str, Pair]] = {place: {} for place in places}
    for (place, kind), pair in facts.sums(groups, zip(places, kind_of), metric).items():
        by_place[place][kind] = pair
    whole = facts.sums(groups, kind_of, metric)
    whole |= {"rest": rest} if rest else {}
    kinds = facts.kinds_of(groups)

    def paint(figure: Any) -> Tooltips:
        heights = {"height_ratios": [1.6, len(by_place) + 0.6]}
        axes = figure.subplots(2, 1, gridspec_kw=heights)
        name = "whole denoiser" if rest else "all groups"
        return _stacks(axes[0], {name: whole}, kinds, "w") | _stacks(axes[1], by_place, kinds, "b")

    height = ROOM * (2 * len(by_place) + 5)
    label = f"{METRICS[metric]} by block and kind, dense and slim"
    return drawn(f"where-{metric}", label, (430, height), paint)


def _stacks(
    axis: Any, rows: dict[str, dict[str, Pair]], kinds: Sequence[str], prefix: str
) -> dict[str, str]:
    """Two bars for each row, the dense one pale above the slim one."""
    tooltips: dict[str, str] = {}
    for row, (name, parts) in enumerate(rows.items()):
        left = Pair(0, 0)
        for kind in (kind for kind in (*kinds, "rest") if kind in parts):
            pair, colour = parts[kind], COLOURS[kind_colour(kind, kinds)]
            gid, bar = f"{prefix}{len(tooltips)}", {"height": BAR, "linewidth": 0}
            axis.barh(row - 0.2, pair.dense, left=left.dense, color=(colour, PALE), **bar)
            axis.barh(row + 0.2, pair.slim, left=left.slim, color=colour, gid=gid, **bar)
            left += pair
            told = numbers.change(numbers.count(pair.dense), numbers.count(pair.slim))
            tooltips[gid] = f"{name}, {kind_name(kind)}: {told}"
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x")
    axis.grid(visible=False, axis="y")
    cover(axis.xaxis, nbins=5)
    axis.xaxis.set_major_formatter(lambda value, _: numbers.count(value))
    axis.spines["bottom"].set_visible(False)
    return tooltips


def cover(axis: Any, nbins: int) -> None:
    """Round ticks from zero, the last of them at or above the longest bar."""
    from matplotlib.ticker import MaxNLocator

    longest = max(axis.get_data_interval())
    end = longest if 0 < longest < math.inf else 1
    found = MaxNLocator(nbins, steps=[1, 2, 2.5, 5, 10]).tick_values(0, end)
    ticks = [tick for tick in found if tick >= 0]
    if ticks[-1] < end:  # the locator takes what is nearly a tick for one
        ticks.append(ticks[-1] + ticks[-1] - ticks[-2])
    axis.set_ticks(ticks)
    limits = (0, ticks[-1])
    axis.axes.set_xlim(limits) if axis.axis_name == "x" else axis.axes.set_ylim(limits)


def plan(results: Results) -> Html:
    """The width of every group along the network: dense as outline, slim filled."""
    groups = facts.groups_of(results)
    kinds, places = facts.kinds_of(groups), _by_place(groups)
    room = {
        place: max(LEAST_ROOM, *(sum(g["kind"] == kind for g in part) for kind in kinds))
        for place, part in places.items()
    }

    def paint(figure: Any) -> Tooltips:
        axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
        tooltips: dict[str, str] = {}
        for axis, kind in zip(axes, kinds):
            mine = {p: [g for g in part if g["kind"] == kind] for p, part in places.items()}
            tooltips |= _widths(axis, mine, room, COLOURS[kind_colour(kind, kinds)])
            title = [kind_name(kind), *([UNITS[kind]] if kind in UNITS else [])]
            axis.set_title(", ".join(title), loc="left", fontsize=12)
        _name_places(axes, room)
        return tooltips

    label = f"Width of all {len(groups)} groups along the network, dense and slim"
    return drawn("plan", label, (WIDE, 30 + 125 * len(kinds)), paint)


def _widths(
    axis: Any, groups: Mapping[str, Sequence[Group]], room: Mapping[str, int], colour: str
) -> dict[str, str]:
    """A bar for each group of a kind; those of one place share its room side by side."""
    tooltips: dict[str, str] = {}
    start = 0.0
    for place, mine in groups.items():
        step = room[place] / max(len(mine), 1)
        for number, group in enumerate(mine):
            x, gid = start + (number + 0.5) * step, f"g{len(tooltips)}-{group['kind']}"
            width, (dense, slim) = facts.inner_width(group), facts.widths_told(group)
            bar = {"width": step * 0.8, "linewidth": 0.8}
            axis.bar(x, width.slim, color=colour, edgecolor="none", width=bar["width"])
            axis.bar(x, width.dense, color=(colour, 0.13), edgecolor=colour, gid=gid, **bar)
            share = numbers.percent(1 - width.removed)
            tooltips[gid] = f"{group['name']}: {slim} of {dense} ({share})"
        start += room[place]
    cover(axis.yaxis, nbins=3)
    axis.spines["bottom"].set_color(COLOURS["muted"])
    return tooltips


def _name_places(axes: Sequence[Any], room: Mapping[str, int]) -> None:
    """Lines between the parts of the network, and their names below."""
    end, middles = 0, []
    for bars in room.values():
        middles.append(end + bars / 2)
        end += bars
        for axis in axes if end < sum(room.values()) else []:
            axis.axvline(end, color=COLOURS["line"], linewidth=0.8)
    crowded = any(LETTER * len(place) > WIDE / end * bars for place, bars in room.items())
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes[-1].set_xticks(middles, list(room), **turned)
    axes[-1].set_xlim(-0.1, end + 0.1)


def _by_place(groups: Sequence[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for place, group in zip(facts.places_of(groups), groups):
        found.setdefault(place, []).append(group)
    return found
