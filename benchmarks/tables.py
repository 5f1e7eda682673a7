"""Render benchmarks/README.md, and the README's table, from the JSON in benchmarks/results/.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ERROR = "velocity_error"
START, END = "<!-- figures: benchmarks/tables.py -->", "<!-- end of figures -->"
HEAD = """# Benchmarks

Every figure here was written by a script of this folder; `python benchmarks/tables.py` renders this
page from `results/`. Times are of one run on the machine named with them, which other jobs shared:
read them as upper bounds.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def made_by(result: dict[str, Any]) -> str:
    """The machine and the command of a result."""
    m = result["machine"]
    return f"`{m['command']}` on {m['cpu']}, {m['threads']} threads, torch {m['torch']}."


def evidence(result: dict[str, Any]) -> str:
    """slimdiff beside its peers."""
    rows, settings = result["rows"], result["settings"]
    parts = [
        f"## Beside the peers, on scenes-unet{' (quick)' if settings['quick'] else ''}\n\n"
        f"One calibration on {settings['calibration_prompts']} prompts for all rows. Velocity "
        f"error along the dense trajectory of {settings['errors']} test prompts; images of the "
        f"number of test prompts given with the accuracy (dense and the headline get more). "
        f"`faster` is the sampling of one image, 20 steps without the VAE, dense and slim in turn, "
        f"on a machine that ran other jobs beside. MACs are those of 77 text tokens; a budget in "
        f"MACs counts the fewer tokens of the reference's own prompts. "
        f"Seconds are those of compressing after calibration. Origin `ours` is a small "
        f"implementation in `benchmarks/peers/`; the others are the public packages."
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
        "GiB",
    )
    ordered = sorted(rows.values(), key=lambda row: (row.get("removed", 1), row.get(ERROR, 1)))
    for title in dict.fromkeys(row["group"] for row in ordered):
        cells = [evidence_row(row, dense) for row in ordered if row["group"] == title]
        parts.append(f"### {title}\n\n{table(head, cells)}")
    parts.append(made_by(result))
    return "\n\n".join(parts) + "\n"


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
        f"{row['peak_gib']:.1f}",
    ]


def ablations(result: dict[str, Any]) -> str:
    """One thing changed at a time."""
    rows, settings = result["rows"], result["settings"]
    shares = [f"{share:.2f}" for share in settings["shares"]]
    base = rows["as it is"]["errors"]
    cells = [
        [name] + [f"{row['errors'][s]:.2e} ({row['errors'][s] / base[s]:.2f})" for s in shares]
        for name, row in rows.items()
    ]
    head = ("one change to the default recipe", *(f"{float(s):.0%} removed" for s in shares))
    return (
        f"## Ablations on scenes-unet\n\nVelocity error on {settings['error_prompts']} selection "
        f"prompts, and in brackets over that of the recipe as it is, at shares of attention and "
        f"feed-forward parameters removed. Calibrated on {settings['calibration_prompts']} prompts "
        f"and 20 steps where the row says nothing else.\n\n"
        f"{table(head, cells)}\n\n{made_by(result)}\n"
    )


def speed(results: Sequence[dict[str, Any]]) -> str:
    """Fewer MACs against less time."""
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
            f"{result['recording']['plain_seconds']:.2f} s",
            f"{result['recording']['recorded_seconds']:.2f} s",
            f"{result['recording']['overhead']:.0%}",
            f"{result['rows'][0]['save_seconds']:.1f} s",
            f"{result['rows'][0]['load_seconds']:.1f} s",
        ]
        for result in results
    ]
    titles = ("UNet", "dtype", "plain call", "recorded", "recording adds", "save", "load")
    commands = "\n".join(f"- {result['model']}: {made_by(result)}" for result in results)
    return (
        "## Speed at real size\n\nRandom weights, the same share of every attention and "
        "feed-forward width removed; medians of interleaved calls at batch 1.\n\n"
        f"{table(head, rows)}\n\nA call at batch 2 with statistics being recorded (float32 sums) "
        f"against a plain one, and the slim UNet of the first row saved and loaded.\n\n"
        f"{table(titles, more)}\n\n{commands}\n"
    )


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
    head = ("UNet", "parameters", "dtype, latents", "recipe, allocation", *stages)
    commands = "\n".join(f"- {result['model']}: {made_by(result)}" for result in results)
    return (
        "## Scale\n\nPublished configurations with random weights, one process each: seconds and "
        "peak memory above the model of every stage (record: two forwards). `curves` decomposes "
        "every group and measures its gain.\n\n"
        f"{table(head, rows)}\n\n{commands}\n"
    )


def headline(result: dict[str, Any]) -> str:
    """The README's table: every method at 41 % removed, best first."""
    rows = [row for row in result["rows"].values() if row.get("removed") == 0.41]
    rows = sorted((r for r in rows if "unavailable" not in r), key=lambda r: r["velocity_error"])
    rows.insert(0, result["rows"]["dense"])
    cells = [
        [
            row["method"],
            f"{row['velocity_error']:.1e}" if row["velocity_error"] else "",
            f"{row['psnr']:.1f} dB" if row["velocity_error"] else "",
            f"{row['scene_accuracy']:.1%} of {row['images']}",
            f"{row['sampling_speedup']:.2f}" if row["velocity_error"] else "",
        ]
        for row in rows
    ]
    head = ("", "velocity error", "PSNR to the dense images", "scenes right", "times faster")
    return table(head, cells)


def put_headline(result: dict[str, Any]) -> None:
    """Replace the README's table, which stands between two comments."""
    path = HERE.parent / "README.md"
    before, rest = path.read_text().split(START)
    after = rest.split(END)[1]
    path.write_text(f"{before}{START}\n{headline(result)}\n{END}{after}")


def main() -> None:
    """Write the page, and the README's table."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted((HERE / "results").glob("*.json"))}
    parts = [HEAD]
    if "evidence" in found:
        parts.append(evidence(found["evidence"]))
        put_headline(found["evidence"])
    if "ablations" in found:
        parts.append(ablations(found["ablations"]))
    if scales := [result for name, result in found.items() if name.startswith("scale-")]:
        parts.append(scale(scales))
    if speeds := [result for name, result in found.items() if name.startswith("speed-")]:
        parts.append(speed(speeds))
    (HERE / "README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
