"""Composition: two slimmings, one after the other, told as one of the dense denoiser.

The maps of a denoiser that was healed in between are joined all the same: they say which heads and
units stay and how channels are mixed, but no longer give the weights.

Shape letters: `h` dense heads of width `e`; `K` heads of width `r` after the first slimming, `L` of
width `s` after the second; `i` = h e inner channels; `f` dense hidden units, `m` after the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.denoiser import settings
from slimdiff.errors import SlimdiffError
from slimdiff.groups import LAYERS
from slimdiff.plan import Entry, Plan, SlimRecord

Maps = Mapping[str, Tensor]


def earlier_record(denoiser: nn.Module) -> SlimRecord | None:
    """The plan and the maps of a denoiser that is slim already; None of a dense one.

    Raises:
        SlimdiffError: it is slim, but carries neither.
    """
    if not settings(denoiser).get("slimdiff"):
        return None
    record: Any = getattr(denoiser, "slim_record", None)
    if not isinstance(record, SlimRecord):
        raise SlimdiffError(
            f"{type(denoiser).__name__}: is slim already, but slim_record is {record!r}, expected "
            f"the plan and maps that lead on from the dense model; load it with slimdiff.load or "
            f"load_pipeline from a folder that has slimdiff.json and slimdiff_maps.safetensors, or "
            f"start from the dense model"
        )
    return record


def composed(first: SlimRecord, second: SlimRecord) -> SlimRecord:
    """The record of a denoiser that was slimmed under `first`, and then under `second`.

    Args:
        first: its plan and maps begin at the dense denoiser.
        second: its plan and maps begin where `first` ends.
    """
    before, after = _by_group(first.maps), _by_group(second.maps)
    maps: dict[str, Tensor] = {}
    for name in dict.fromkeys((*before, *after)):
        now = second.plan.entries.get(name)
        if now is not None and not now.width:
            continue
        one, two = before.get(name), after.get(name)
        both = composed_maps(one, two, first.plan.entries[name]) if one and two else one or two
        maps |= {f"{name}/{role}": value for role, value in (both or {}).items()}
    return SlimRecord(composed_plan(first.plan, second.plan), maps)


def composed_plan(first: Plan, second: Plan) -> Plan:
    """The plan from what `first` began with to what `second` ends with.

    The predicted error is the sum of both.
    """
    entries = dict(first.entries)
    for name, entry in second.entries.items():
        if (before := first.entries.get(name)) is not None:
            width, heads = before.dense_width, before.dense_heads
            entry = replace(entry, dense_width=width, dense_heads=heads)
        entries[name] = entry
    fused = sorted({*first.fused, *second.fused})
    budgets = [plan.budget for plan in (first, second) if plan.budget]
    return replace(
        second,
        denoiser=first.denoiser,
        entries=entries,
        budget=", then ".join(budgets),
        figures=_figures(first.figures, second.figures) | _counts(entries, fused),
        fused=fused,
    )


def _figures(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes at both ends, and what was lost on the way, as far as both plans know it."""
    begun, gone = ("params_dense", "macs_dense", "bytes_dense"), ("layers_removed", "heads_removed")
    own = (*begun, *gone, "predicted_error", "latency")
    figures = {key: value for key, value in second.items() if key not in own}
    figures |= {key: first[key] for key in begun if key in first}
    if "predicted_error" in first and "predicted_error" in second:
        figures["predicted_error"] = first["predicted_error"] + second["predicted_error"]
    if "latency" in first and "latency" in second:
        figures["latency"] = _latency(first["latency"], second["latency"])
    return figures


def _counts(entries: Mapping[str, Entry], fused: Sequence[str]) -> dict[str, int]:
    """Layers that went wholly, heads of those that stay, fused upsamplers; 0 is left out."""
    values = [entry for entry in entries.values() if entry.kind == "value_output"]
    others = [entry for entry in entries.values() if LAYERS[entry.kind] != "attention"]
    counts = {
        "layers_removed": sum(not entry.width for entry in (*values, *others)),
        "heads_removed": sum(own.dense_heads - own.heads for own in values if own.width),
        "upsamplers_fused": len(fused),
    }
    return {name: count for name, count in counts.items() if count}


def _latency(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    times = {key: first[key] * second[key] for key in ("speedup", "wanted")}
    return {"dense": first["dense"], "slim": second["slim"], **times}


def composed_maps(one: Maps, two: Maps, entry: Entry) -> dict[str, Tensor]:
    """The maps of one group from dense weights to those after both slimmings, on the CPU.

    Args:
        one: from the dense weights.
        two: from the weights that `one` made.
        entry: what the first slimming made of the group.
    """
    one, two = (_plain(maps) for maps in (one, two))
    if entry.kind == "resnet":
        return {"channels": one["channels"][two["channels"]]}
    if entry.kind == "feed_forward":
        return _units(one, two, entry.dense_width)
    return _heads(one, two, entry)


def _heads(one: Maps, two: Maps, entry: Entry) -> dict[str, Tensor]:
    """Which heads stay, (L,), and what is done to each: q, k, v (L, e, s), out (i, L s).

    Maps that are missing are identities: of all heads, or of all channels of a head.
    """
    maps: dict[str, Tensor] = {}
    chosen = two.get("heads", torch.arange(entry.heads))
    if "heads" in one or "heads" in two:
        maps["heads"] = one.get("heads", torch.arange(entry.dense_heads))[chosen]
    for role in ("q", "k", "v"):
        if role in one:
            kept = one[role][chosen]
            maps[role] = kept @ two[role] if role in two else kept
        elif role in two:
            maps[role] = two[role]
    if "out" in one or "out" in two:
        out_ik = _out(one, entry.dense_heads, entry.dense_width)
        maps["out"] = out_ik @ _out(two, entry.heads, entry.width)
    return maps


def _out(maps: Maps, heads: int, width: int) -> Tensor:
    """The map (h e, K r) of the output's columns, that of `heads` of `width`."""
    if "out" in maps:
        return maps["out"]
    eye_ihe = torch.eye(heads * width, dtype=torch.float64).view(-1, heads, width)
    return eye_ihe[:, maps.get("heads", torch.arange(heads))].flatten(1)


def _units(one: Maps, two: Maps, width: int) -> dict[str, Tensor]:
    """Units (s,) that stay of `width`, and the coupling (f - s, s) of the others to them.

    T (f, s) = T1 T2, where T has rows of the identity at its units and the coupling elsewhere.
    """
    units_m, coupling = one["units"], one["coupling"]
    kept_s, removed_t = two["units"], _others(two["units"], len(units_m))
    units_s = units_m[kept_s]
    rows_fs = torch.zeros(width, len(units_s), dtype=torch.float64)
    rows_fs[units_m[removed_t]] = two["coupling"]
    rows_fs[_others(units_m, width)] = (
        coupling[:, kept_s] + coupling[:, removed_t] @ two["coupling"]
    )
    return {"units": units_s, "coupling": rows_fs[_others(units_s, width)]}


def _others(chosen: Tensor, width: int) -> Tensor:
    """The indices below `width` that are not `chosen`, ascending."""
    rest = torch.ones(width, dtype=torch.bool)
    rest[chosen] = False
    return rest.nonzero().flatten()


def _plain(maps: Maps) -> dict[str, Tensor]:
    """On the CPU; in float64 where they are no indices."""
    return {
        role: (value.double() if value.is_floating_point() else value.long()).cpu()
        for role, value in maps.items()
    }


def _by_group(maps: Maps) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for path, value in maps.items():
        name, _, role = path.rpartition("/")
        groups.setdefault(name, {})[role] = value
    return groups
