"""Tables of single layers: what is outside attention, feed-forward and ResNets, and upsamplers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rendering import made_by, table


def rest(result: dict[str, Any]) -> str:
    """The layers outside attention, feed-forward and ResNets."""
    settings, rows = result["settings"], result["rows"]
    kept = [str(share) for share in settings["kept"]]
    layers = [
        [
            name,
            *(f"{row[what]:.2%}" for what in ("params", "macs")),
            *(f"{row[share]:.1e}" for share in kept),
        ]
        for name, row in rows.items()
        if kept[0] in row
    ]
    plans = _beside(rows, "without", "with")
    alone = ("layer", "of all parameters", "of all MACs", *(f"{float(s):.0%} left" for s in kept))
    return (
        f"## The other layers, on scenes-unet\n\nShortcuts, down- and upsampling, projections into "
        f"and out of transformers, time embeddings, first and last convolution: what each holds, "
        f"and the velocity error on held-out probes when it alone is factored to a rank that "
        f"leaves a share of it.\n\n{table(alone, layers)}\n\nTime embeddings see as many inputs as "
        f"there are timesteps, and those of other steps are lost; they, and the first and last "
        f"convolution, stay. The others may shrink (`projection`): plans without and with them, "
        f"velocity error on {settings['error_prompts']} selection prompts.\n\n"
        f"{table(('left', 'without', 'with', 'with / without'), plans)}\n\n{made_by(result)}\n"
    )


def upsamplers(result: dict[str, Any]) -> str:
    """Upsamplers fused and not."""
    settings, rows = result["settings"], result["rows"]
    timed = [
        [
            name,
            *(f"{1000 * row[how]:.1f} ms" for how in ("plain", "fused")),
            f"{row['speedup']:.2f}",
            *(f"{row[f'{how}_error']:.1e}" for how in ("plain", "fused")),
        ]
        for name, row in rows.items()
        if "plain" in row
    ]
    plans = _beside(rows, "not fused", "fused")
    head = ("upsampler", "plain", "fused", "times faster", "error, plain", "error, fused")
    return (
        f"## Fused upsamplers\n\nThe upsamplers of SD1.5 and SDXL, two rows, random weights, as "
        f"diffusers runs them and fused: medians of {settings['runs']} runs in turn, and the "
        f"relative distance to the output in float64.\n\n{table(head, timed)}\n\nPlans for "
        f"scenes-unet with its upsamplers fused or not, all else alike; velocity error on "
        f"{settings['error_prompts']} selection prompts.\n\n"
        f"{table(('left', 'not fused', 'fused', 'fused / not'), plans)}\n\n{made_by(result)}\n"
    )


def _beside(rows: Mapping[str, Any], one: str, other: str) -> list[list[str]]:
    """Budget, its error in either way, and the second over the first."""
    budgets = [name.removesuffix(f", {one}") for name in rows if name.endswith(f", {one}")]
    pairs = [[rows[f"{name}, {how}"]["error"] for how in (one, other)] for name in budgets]
    return [
        [name, f"{a:.2e}", f"{b:.2e}", f"{b / a:.2f}"]
        for name, (a, b) in zip(budgets, pairs, strict=True)
    ]
