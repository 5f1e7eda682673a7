"""Tables of slimdiff beside its peers: all rows, and the README's choice of them."""

from __future__ import annotations

from typing import Any

from rendering import made_by, table

ERROR = "velocity_error"
GROUPS = ("Dense", "feed-forward removed", "MACs left", "whole UNet removed", "times faster")
"""What the titles of the evidence's groups have in them, in the order of the page."""


def evidence(result: dict[str, Any]) -> str:
    """slimdiff beside its peers."""
    rows, settings = result["rows"], result["settings"]
    parts = [
        f"## Beside the peers, on scenes-unet{' (quick)' if settings['quick'] else ''}\n\n"
        f"One calibration on {settings['calibration_prompts']} prompts for all rows. Velocity "
        f"error along the dense trajectory of {settings['errors']} test prompts; images of the "
        f"number of test prompts given with the accuracy (dense and the headline get more). "
        f"`faster` is the sampling of one image, 20 steps without the VAE, dense and slim in turn, "
        f"on a machine that ran other jobs beside. MACs are those of one call as the pipeline "
        f"makes it, which is what budgets count. Seconds, and the memory that the process grew by "
        f"at most, are those of compressing after calibration. Peers are told parameters to "
        f"remove: for a budget in MACs, how many is found by bisection, and the seconds are those "
        f"of the last of its steps that fits. Origin `ours` is a small "
        f"implementation in `benchmarks/peers/`; the others are the public packages. These rows "
        f"are of probes that saw the empty prompt alone, and were not measured again.\n\n"
        f"![Scenes right against time and parameters, and error](../docs/pareto-scenes.svg)"
    ]
    dense = rows["dense"]
    head = (
        "method",
        "origin",
        "parameters",
        "MACs",
        "velocity error",
        "scenes right (95 %)",
        "of",
        "PSNR",
        "SSIM",
        "faster",
        "seconds",
        "peak, MiB",
    )
    ordered = sorted(rows.values(), key=lambda row: (*place(row["group"]), row.get(ERROR, 1)))
    for title in dict.fromkeys(row["group"] for row in ordered):
        cells = [evidence_row(row, dense) for row in ordered if row["group"] == title]
        parts.append(f"### {title}\n\n{table(head, cells)}")
    parts.append(made_by(result))
    return "\n\n".join(parts) + "\n"


def place(group: str) -> tuple[int, str]:
    """Where a group of rows stands on the page."""
    return next(i for i, words in enumerate(GROUPS) if words in group), group


def evidence_row(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    """One row of the evidence, or why there is none."""
    if "unavailable" in row:
        return [row["method"], row["unavailable"], *[""] * 10]
    low, high = row["interval"]
    macs = f"{row['macs'] / dense['macs']:.1%}" if "macs" in row else ""
    error = f"{row['velocity_error']:.2e}" if "velocity_error" in row else ""
    return [
        row["method"],
        row.get("origin", ""),
        f"{row['params'] / dense['params']:.1%}",
        macs,
        error,
        f"{row['scene_accuracy']:.1%} ({low:.1%} to {high:.1%})",
        str(row["images"]),
        f"{row['psnr']:.1f}",
        f"{row['ssim']:.4f}",
        f"{row['sampling_speedup']:.2f}",
        f"{row['seconds']:.0f}",
        f"{row['peak_mib']:.0f}",
    ]
