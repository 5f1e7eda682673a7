"""The report's bars: where parameters and MACs went, and the plan as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from slimdiff.report import numbers
from slimdiff.report.facts import (
    METRICS,
    Group,
    Pair,
    groups_of,
    inner_width,
    kind_name,
    kinds_of,
    places_of,
    rest_of,
    sums,
)
from slimdiff.report.html import Html
from slimdiff.report.svg import COLOURS, Tooltips, drawn
from slimdiff.results import Results

WIDE = 1040  # CSS pixels: fills the page
PALE = 0.3
BAR, ROOM = 0.38, 22  # height of a bar in rows, and of a row in pixels
LETTER = 7  # CSS pixels of a label


def kind_colour(kind: str, kinds: Sequence[str]) -> str:
    """The colour of a kind, the same in all plots."""
    return COLOURS["rest" if kind == "rest" else f"kind-{list(kinds).index(kind) % 4}"]


def where_it_went(results: Results, metric: str) -> Html:
    """Dense and slim bars, stacked by kind: of the whole denoiser, and of each block."""
    groups = groups_of(results)
    rest = rest_of(results, metric)
    kind_of = [group["kind"] for group in groups]
    by_place: dict[str, dict[str, Pair]] = {place: {} for place in places_of(groups)}
    for (place, kind), pair in sums(groups, zip(places_of(groups), kind_of), metric).items():
        by_place[place][kind] = pair
    whole = sums(groups, kind_of, metric)
    whole |= {"rest": rest} if rest else {}
    kinds = kinds_of(groups)

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
        for kind, pair in parts.items():
            gid, colour = f"{prefix}{len(tooltips)}", kind_colour(kind, kinds)
            bar = {"height": BAR, "linewidth": 0}
            axis.barh(row - 0.2, pair.dense, left=left.dense, color=(colour, PALE), **bar)
            axis.barh(row + 0.2, pair.slim, left=left.slim, color=colour, gid=gid, **bar)
            left += pair
            told = numbers.change(numbers.count(pair.dense), numbers.count(pair.slim))
            tooltips[gid] = f"{name}, {kind_name(kind)}: {told}"
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x")
    axis.grid(visible=False, axis="y")
    axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter(lambda value, _: numbers.count(value))
    axis.spines["bottom"].set_visible(False)
    return tooltips


def plan(results: Results) -> Html:
    """The width of every group along the network: dense as outline, slim filled."""
    groups = groups_of(results)
    places = [(place, len({g["block"] for g in part})) for place, part in _by_place(groups)]
    blocks = list(dict.fromkeys(group["block"] for group in groups))
    kinds = kinds_of(groups)

    def paint(figure: Any) -> Tooltips:
        axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
        tooltips: dict[str, str] = {}
        for axis, kind in zip(axes, kinds):
            mine = [group for group in groups if group["kind"] == kind]
            tooltips |= _widths(axis, mine, blocks, kind_colour(kind, kinds))
            unit = "hidden units" if kind == "feed_forward" else "channels"
            axis.set_title(f"{kind_name(kind)}, {unit}", loc="left", fontsize=12)
        _name_places(axes, places)
        return tooltips

    label = f"Width of all {len(groups)} groups along the network, dense and slim"
    return drawn("plan", label, (WIDE, 30 + 125 * len(kinds)), paint)


def _widths(
    axis: Any, groups: Sequence[Group], blocks: Sequence[str], colour: str
) -> dict[str, str]:
    """A bar for each group; those of one block share its place side by side."""
    tooltips: dict[str, str] = {}
    for block, part in groupby(groups, key=lambda group: group["block"]):
        mine = list(part)
        room = 0.84 / len(mine)
        for number, group in enumerate(mine):
            x = blocks.index(block) - 0.42 + (number + 0.5) * room
            width, gid = inner_width(group), f"g{len(tooltips)}-{group['kind']}"
            share = numbers.percent(1 - width.removed)
            told = f"{width.slim:,.0f} of {width.dense:,.0f} ({share})"
            bar = {"width": room * 0.86, "linewidth": 0.8}
            axis.bar(x, width.slim, color=colour, edgecolor="none", width=bar["width"])
            axis.bar(x, width.dense, color=(colour, 0.13), edgecolor=colour, gid=gid, **bar)
            tooltips[gid] = f"{group['name']}: {told}"
    axis.locator_params(axis="y", nbins=4)
    axis.spines["bottom"].set_color(COLOURS["muted"])
    return tooltips


def _name_places(axes: Sequence[Any], places: Sequence[tuple[str, int]]) -> None:
    """Lines between the parts of the network, and their names below."""
    start, middles = 0, []
    for _, blocks in places:
        middles.append(start + blocks / 2 - 0.5)
        start += blocks
        for axis in axes if start < sum(blocks for _, blocks in places) else []:
            axis.axvline(start - 0.5, color=COLOURS["line"], linewidth=0.8)
    room = WIDE / start
    crowded = any(LETTER * len(place) > room * blocks for place, blocks in places)
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes[-1].set_xticks(middles, [place for place, _ in places], **turned)
    axes[-1].set_xlim(-0.6, start - 0.4)


def _by_place(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    placed = zip(places_of(groups), groups)
    return [(k, [g for _, g in part]) for k, part in groupby(placed, key=lambda pair: pair[0])]
