"""The table of families: what shrinks in a published model, and what that saves."""

from __future__ import annotations

from typing import Any

from rendering import table

KINDS = ("query_key", "value_output", "feed_forward", "resnet", "modulation", "projection")


def families(result: dict[str, Any]) -> str:
    """One row for each published model, in the order in which they were measured."""
    rows = [
        [
            name,
            f"`{row['class']}`",
            _count(row["params"]),
            *(_share(row["held"].get(kind)) for kind in KINDS),
            *(
                "" if row[f"macs_at_{share}"] is None else f"{row[f'macs_at_{share}']:.0%}"
                for share in result["settings"]["shares"]
            ),
        ]
        for name, row in result["rows"].items()
    ]
    head = (
        "model",
        "class",
        "parameters",
        "queries, keys",
        "values, outputs",
        "feed-forward",
        "ResNets",
        "modulation",
        "projection",
        *(f"MACs at {share:.0%}" for share in result["settings"]["shares"]),
    )
    return table(head, rows)


def kept(result: dict[str, Any]) -> str:
    """What does not shrink in which class, and why."""
    told = {row["class"]: row["kept"] for row in result["rows"].values() if row["kept"]}
    return "\n".join(
        f"- `{name}`, {what}: {why}." for name, parts in told.items() for what, why in parts.items()
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _count(value: int) -> str:
    return f"{value / 1e9:.1f} B" if value >= 1e9 else f"{value / 1e6:.0f} M"
