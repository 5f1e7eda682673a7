"""Tables of what was measured at real size: stages, speed, and speed that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rendering import made_by, table


def speed(results: Sequence[dict[str, Any]], recordings: Sequence[dict[str, Any]]) -> str:
    """Fewer MACs against less time; and what recording adds, at other sizes too."""
    rows = [
        [
            result["model"],
            f"{result['dtype']}, {result['latents']} by {result['latents']}",
            f"{row['removed']:.0%}",
            f"{result['params'] / 1e6:.0f} M to {row['params'] / 1e6:.0f} M",
            f"{row['dense_seconds']:.2f} s to {row['slim_seconds']:.2f} s",
            f"{row['speedup']:.2f}",
            f"{row['macs_allow']:.2f}",
            f"{row['share_reached']:.0%}",
        ]
        for result in results
        for row in result["rows"]
    ]
    head = (
        "UNet",
        "dtype, latents",
        "of attention and feed-forward removed",
        "parameters",
        "one call",
        "times faster",
        "the MACs allow",
        "reached",
    )
    more = [
        [
            result["model"],
            result["dtype"],
            f"{result['rows'][0]['save_seconds']:.1f} s",
            f"{result['rows'][0]['load_seconds']:.1f} s",
        ]
        for result in results
    ]
    recorded = ("UNet", "dtype, latents", "in a row", "plain call", "recorded", "recording adds")
    all_results = (*results, *recordings)
    commands = "\n".join(f"- {result['model']}: {made_by(result)}" for result in all_results)
    return (
        "## Speed at real size\n\nRandom weights, the same share of every attention and "
        "feed-forward width removed; medians of interleaved calls at batch 1.\n\n"
        f"{table(head, rows)}\n\nThe slim UNet of the first row saved and loaded.\n\n"
        f"{table(('UNet', 'dtype', 'save', 'load'), more)}\n\nA call at batch 2 with statistics "
        f"being recorded (float32 sums) against a plain one: calls in a row, as calibration makes "
        f"them, or each recorded by itself (1), which adds the rows of wide layers to their sums "
        f"after every call. Rows of 1 are an earlier speed.py's; now `--calls 1` gives them.\n\n"
        f"{table(recorded, [_recorded(result) for result in recordings])}\n\n"
        f"{commands}\n"
    )


def _recorded(result: dict[str, Any]) -> list[str]:
    return [
        result["model"],
        f"{result['dtype']}, {result['latents']} by {result['latents']}",
        str(result["calls"]),
        f"{result['plain_seconds']:.2f} s",
        f"{result['recorded_seconds']:.2f} s",
        f"{result['overhead']:.0%}",
    ]


def scale(results: Sequence[dict[str, Any]]) -> str:
    """Stages on UNets of real size."""
    stages = list(results[0]["stages"])
    rows = []
    for result in results:
        plan, found = result["plan"], result["stages"]
        cells = [
            f"{found[s]['seconds']:.0f} s / {found[s]['peak_above_model_gib']:.1f} GiB"
            for s in stages
        ]
        size = f"{plan['params_dense'] / 1e6:.0f} M to {plan['params'] / 1e6:.0f} M"
        run = (
            f"{result['dtype'].removeprefix('torch.')}, {result['latents']} by {result['latents']}"
        )
        how = f"{result['recipe']}, {result['allocation']}"
        rows.append([result["model"], size, run, how, *cells])
    head = ("denoiser", "parameters", "dtype, latents", "recipe, allocation", *stages)
    commands = "\n".join(f"- {result['model']}: {made_by(result)}" for result in results)
    return (
        "## Scale\n\nPublished configurations with random weights, one process each: seconds and "
        "peak memory above the model of every stage (record: two forwards). `curves` decomposes "
        "every group and measures its gain.\n\n"
        f"{table(head, rows)}\n\n{commands}\n"
    )


def faster(results: Sequence[dict[str, Any]]) -> str:
    """Latency budgets: asked and measured."""
    rows = [
        [
            result["model"],
            f"{result['dtype']}, {result['latents']} by {result['latents']}",
            f"{result['allocation']}{', all heads' if result['all_heads'] else ''}",
            f"{row['wanted']}",
            *(
                [
                    f"{row['speedup']:.2f}",
                    f"{row['dense_seconds']:.2f} s to {row['slim_seconds']:.2f} s",
                    f"{result['params'] / 1e6:.0f} M to {row['params'] / 1e6:.0f} M",
                    f"{row['heads_removed']} of {row['heads']}" if row["heads_removed"] else "",
                    f"{row['macs'] / result['macs']:.0%}",
                    f"{row['share_reached']:.0%}",
                ]
                if "speedup" in row
                else [row["unavailable"], "", "", "", "", ""]
            ),
        ]
        for result in results
        for row in result["rows"]
    ]
    head = (
        "UNet",
        "dtype, latents",
        "allocation",
        "times faster, asked",
        "measured",
        "one call",
        "parameters",
        "heads gone",
        "MACs left",
        "of what the MACs allow",
    )
    commands = "\n".join(
        f"- {result['model']}, {result['dtype']}: {result['profile_seconds']:.0f} s to time the "
        f"layers; {made_by(result)}"
        for result in results
    )
    return (
        "## Speed that was asked for\n\nRandom weights; ResNets, attention and feed-forward, as "
        "much of them as the time allows: as their error curves say (probed; no layer goes wholly),"
        " or all with the same share of their widths and all heads (uniform). Dense and slim calls "
        "at batch 1, interleaved, apart from the search.\n\n"
        f"{table(head, rows)}\n\n{commands}\n"
    )
