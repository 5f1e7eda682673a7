"""The report's tables of groups: added up by kind and by block, and one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from slimdiff.report import facts, numbers
from slimdiff.report.facts import Group, Pair
from slimdiff.report.html import Html, table, tag
from slimdiff.report.names import METRICS, REST, kind_name
from slimdiff.results import Results

Row = list[object]


def where_it_went(results: Results) -> Html:
    """Parameters and MACs by kind and by block."""
    groups = facts.groups_of(results)
    rows: list[Row] = [["By kind"]]
    kinds = [group["kind"] for group in groups]
    names = {kind: kind_name(kind) for kind in facts.kinds_of(groups)}
    rows += _shares(groups, kinds, names)
    if all(rest := [facts.rest_of(results, metric) for metric in METRICS]):
        rows.append([REST, *(cell for pair in rest if pair for cell in _cells(pair))])
    rows.append(["By block, groups alone"])
    places = facts.places_of(groups)
    rows += _shares(groups, places, dict(zip(places, places)))
    head = ("", "Parameters", "kept", "MACs", "kept")
    return table(head, rows, "Parameters and MACs by kind and block")


def _shares(groups: Sequence[Group], keys: Sequence[str], names: Mapping[str, str]) -> list[Row]:
    params, macs = (facts.sums(groups, keys, metric) for metric in METRICS)
    return [[name, *_cells(params[key]), *_cells(macs[key])] for key, name in names.items()]


def _cells(pair: Pair) -> Row:
    return [
        numbers.change(numbers.count(pair.dense), numbers.count(pair.slim)),
        numbers.percent(1 - pair.removed),
    ]


def groups(results: Results) -> Html:
    """Every group under its part of the network, foldable."""
    found = facts.groups_of(results)
    rows: list[Row] = []
    placed = zip(facts.places_of(found), found)
    for place, part in groupby(placed, key=lambda pair: pair[0]):
        rows += [[tag("code", place)], *(_group(group, place) for _, group in part)]
    head = ("Group", "Kind", "Width", "kept", "Parameters", "MACs", "Gain")
    told = tag("summary", f"Widths, cost and gain of all {len(found)} groups")
    note = (
        "Width is channels per head \N{MULTIPLICATION SIGN} heads, hidden units, or inner channels "
        "of a ResNet; a layer that was removed puts out its mean. Gain is how much of a group's "
        "squared error reaches the denoiser's output, relative to that output's square."
    )
    return tag("details", told, tag("p", note), table(head, rows, "All groups"))


def _group(group: Group, place: str) -> Row:
    costs = [
        numbers.change(numbers.count(group[f"{metric}_dense"]), numbers.count(group[metric]))
        for metric in METRICS
    ]
    gain = group.get("gain")
    return [
        tag("code", group["name"].removeprefix(f"{place}.")),
        kind_name(group["kind"]),
        numbers.change(*facts.widths_told(group)),
        numbers.percent(1 - facts.inner_width(group).removed),
        *costs,
        "" if gain is None else numbers.error(gain),
    ]
