"""The report's tables of groups: added up by kind and by block, and one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

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
from slimdiff.report.html import Html, table, tag
from slimdiff.results import Results

Row = list[object]


def where_it_went(results: Results) -> Html:
    """Parameters and MACs by kind and by block."""
    groups = groups_of(results)
    rows: list[Row] = [["By kind"]]
    kinds = [group["kind"] for group in groups]
    rows += _shares(results, groups, kinds, {kind: kind_name(kind) for kind in kinds_of(groups)})
    if all(rest := [rest_of(results, metric) for metric in METRICS]):
        rows.append([kind_name("rest"), *(cell for pair in rest if pair for cell in _cells(pair))])
    rows.append(["By block, groups alone"])
    places = places_of(groups)
    rows += _shares(results, groups, places, dict(zip(places, places)))
    head = ("", "Parameters", "kept", "MACs", "kept")
    return table(head, rows, "Parameters and MACs by kind and block")


def _shares(
    results: Results, groups: Sequence[Group], keys: Sequence[str], names: Mapping[str, str]
) -> list[Row]:
    params, macs = (sums(groups, keys, metric) for metric in METRICS)
    return [[name, *_cells(params[key]), *_cells(macs[key])] for key, name in names.items()]


def _cells(pair: Pair) -> Row:
    return [
        numbers.change(numbers.count(pair.dense), numbers.count(pair.slim)),
        numbers.percent(1 - pair.removed),
    ]


def groups(results: Results) -> Html:
    """Every group under its block, foldable."""
    found, rows = groups_of(results), list[Row]()
    for block, part in groupby(found, key=lambda group: group["block"]):
        rows += [[tag("code", block)], *(_group(group) for group in part)]
    head = ("Group", "Kind", "Heads", "Width", "kept", "Parameters", "MACs", "Gain")
    told = tag("summary", f"Widths, cost and gain of all {len(found)} groups")
    note = (
        "Width is channels per head, or hidden units. Gain is how much of a group's squared error "
        "reaches the denoiser's output, relative to that output's square."
    )
    return tag("details", told, tag("p", note), table(head, rows, "All groups"))


def _group(group: Group) -> Row:
    heads, gain = (group.get("dense_heads"), group.get("heads")), group.get("gain")
    costs = [
        numbers.change(numbers.count(group[f"{metric}_dense"]), numbers.count(group[metric]))
        for metric in METRICS
    ]
    return [
        tag("code", group["name"].removeprefix(f"{group['block']}.")),
        kind_name(group["kind"]),
        "" if heads[0] is None else numbers.change(*heads),
        numbers.change(group["dense_width"], group["width"]),
        numbers.percent(1 - inner_width(group).removed),
        *costs,
        "" if gain is None else numbers.error(gain),
    ]
