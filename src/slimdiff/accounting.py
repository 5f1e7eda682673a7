"""Accounting: where parameters and MACs are, group by group, dense and slim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimdiff.costs import Costs
from slimdiff.curves import ErrorCurve
from slimdiff.groups import Group
from slimdiff.plan import Entry

POINTS = 32
"""Widths of an error curve that go into results."""


def entries_of(dense: Sequence[Group], slim: Sequence[Group]) -> dict[str, Entry]:
    """What became of each dense group, read off the groups of the slim denoiser.

    A group that is not there belongs to a layer that was removed.
    """
    there = {group.name: (group.width, group.heads) for group in slim}
    found = {}
    for group in dense:
        width, heads = there.get(group.name, (0, group.heads))
        found[group.name] = Entry(group.kind, width, group.width, heads, group.heads)
    return found


def account(
    groups: Sequence[Group],
    costs: Costs,
    entries: Mapping[str, Entry],
    curves: Mapping[str, ErrorCurve] | None = None,
) -> dict[str, Any]:
    """The sections `groups` and `rest` of results.

    Args:
        groups: of the dense denoiser.
        costs: of the dense denoiser.
        entries: what becomes of each group; groups without one stay as they are.
        curves: error curves, where they are known.
    """
    rows = [
        _row(group, costs, entries.get(group.name), (curves or {}).get(group.name))
        for group in groups
    ]
    rest = {
        metric: costs.total(metric) - sum(row[f"{metric}_dense"] for row in rows)
        for metric in ("params", "macs")
    }
    return {"groups": rows, "rest": rest}


def _row(
    group: Group, costs: Costs, entry: Entry | None, curve: ErrorCurve | None
) -> dict[str, Any]:
    entry = entry or Entry(group.kind, group.width, group.width, group.heads, group.heads)
    cost, inner = costs.groups[group.name], group.heads * group.width
    row: dict[str, Any] = {
        "name": group.name,
        "kind": group.kind,
        "block": group.block,
        "layer": group.layer,
        "width": entry.width,
        "dense_width": entry.dense_width,
        "heads": entry.heads,
        "dense_heads": entry.dense_heads,
        "gain": None if curve is None else curve.gain,
        "curve": None if curve is None else sampled(curve, entry),
    }
    for metric in ("params", "macs"):
        fixed = cost.fixed if metric == "params" else 0
        row[metric] = cost.of(metric, entry.heads * entry.width) + fixed
        spared = 0 if metric == "params" else cost.spared
        row[f"{metric}_dense"] = cost.of(metric, inner) + fixed + spared
    return row


def sampled(curve: ErrorCurve, entry: Entry) -> dict[str, list[Any]]:
    """About `POINTS` points of a curve, evenly spaced, with both ends and the chosen width.

    The curve is that of the heads that stay, where it is known.
    """
    fewer = entry.heads if entry.heads in (curve.by_heads or {}) else None
    dense = len(curve.errors) - 1
    step = max(1, dense // POINTS)
    widths = sorted({*range(0, dense, step), dense, entry.width})
    return {"widths": widths, "errors": [curve.at(width, fewer) for width in widths]}
