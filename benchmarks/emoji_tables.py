"""The README's table: slimdiff beside its peer on the reference that does not forgive."""

from __future__ import annotations

from typing import Any

from rendering import table

HEAD = (
    "budget",
    "",
    "parameters",
    "MACs",
    "velocity error",
    "printed (95 %)",
    "PSNR",
    "likeness to the glyph",
    "emoji right",
    "call, faster",
)


def emoji(result: dict[str, Any]) -> str:
    """A row for each method under each budget, in the order of the budgets; dense first."""
    rows = [row for row in result["rows"].values() if "unavailable" not in row]
    dense = result["rows"]["dense"]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    ordered = sorted(rows, key=lambda row: (groups.index(row["group"]), row["velocity_error"]))
    return table(HEAD, [_cells(row, dense) for row in ordered])


def _cells(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    likeness = row.get("likeness", {})
    first = [
        row["group"] if row is not dense else "",
        row["method"],
        f"{row['params'] / dense['params']:.0%}",
        f"{row['macs'] / dense['macs']:.0%}",
    ]
    right = f"{row['scene_accuracy']:.0%} of {row['images']}"
    if row is dense:
        return [*first, "", "", "", f"{likeness['mean']:.2f}", right, ""]
    return [
        *first,
        f"{row['velocity_error']:.1e}",
        _printed(row.get("printed", {})),
        f"{row['psnr']:.1f} dB",
        f"{likeness['mean']:.2f} ({likeness['change']:+.3f})",
        right,
        f"{row['call_speedup']:.2f}",
    ]


def _printed(figures: dict[str, Any]) -> str:
    """The error that the compression stated, with its interval over prompts."""
    if "error_on_probes" not in figures:
        return ""
    low, high = figures.get("error_interval", (None, None))
    around = "" if low is None else f" ({low:.1e} to {high:.1e})"
    return f"{figures['error_on_probes']:.1e}{around}"
