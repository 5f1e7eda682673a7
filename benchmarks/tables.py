"""Render benchmarks/README.md, and the README's table, from the JSON in benchmarks/results/.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rendering import made_by, table
from speed_tables import faster, scale, speed

HERE = Path(__file__).parent
ERROR = "velocity_error"
HEAD = """# Benchmarks

Every figure here was written by a script of this folder; `python benchmarks/tables.py` renders this
page from `results/`. Times are of one run on the machine named with them, which other jobs shared:
read them as upper bounds.
"""


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


def elastic(result: dict[str, Any]) -> str:
    """Two widths over the timesteps against one."""
    rows = [
        [
            f"{row['macs']:.0%}",
            f"{row['low']:.0%} at {row['cheap_steps']} of {row['steps']} steps, else "
            f"{row['high']:.0%}",
            f"{row['one_width']:.2e}",
            f"{row['two_widths']:.2e}",
            f"{row['ratio']:.2f}",
        ]
        for row in result["rows"]
    ]
    head = ("mean MACs", "two widths", "error of one width", "of two", "ratio")
    return (
        "## Two widths over the timesteps\n\nVelocity error on selection prompts at equal mean "
        "MACs; timesteps are assigned on one half of the prompts and judged on the other.\n\n"
        f"{table(head, rows)}\n\n{made_by(result)}\n"
    )


def half(result: dict[str, Any]) -> str:
    """Slim models in half precision."""
    rows = [
        [name, f"{found['dense']:.2e}", f"{found['slim']:.2e}"]
        for name, found in result["dtypes"].items()
    ]
    growth = "; ".join(
        f"the largest {what} grows at most {found['times']:.2f} times ({found['group']}), over "
        f"twice in {result[f'groups_whose_{what}_grows_over_2']} groups"
        for what in ("weight", "activation")
        if (found := result[f"largest_growth_of_a_{what}"])
    )
    return (
        f"## Half precision\n\nVelocity error on the probes against the dense float32 model, with "
        f"{result['params_share']:.0%} of the parameters left; the slim model in float32 has "
        f"{result['float32']:.2e}. Over the dense range, {growth}.\n\n"
        f"{table(('dtype', 'dense', 'slim'), rows)}\n\n{made_by(result)}\n"
    )


OTHERS = {"elastic": elastic, "half": half}


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


def whole(result: dict[str, Any]) -> str:
    """The README's other table: ResNets too."""
    rows = [row for name, row in result["rows"].items() if name.startswith(("whole", "speed"))]
    dense = result["rows"]["dense"]
    cells = [
        [
            row["group"],
            row["method"],
            f"{row['params'] / dense['params']:.0%}",
            f"{row['macs'] / dense['macs']:.0%}",
            f"{row['velocity_error']:.1e}",
            f"{row['psnr']:.1f} dB",
            f"{row['scene_accuracy']:.1%} of {row['images']}",
            f"{row['call_speedup']:.2f}",
        ]
        for row in sorted(rows, key=lambda row: (row["group"], row["velocity_error"]))
    ]
    head = ("", "", "parameters", "MACs", "velocity error", "PSNR", "scenes right", "call, faster")
    return table(head, cells)


def put_headlines(result: dict[str, Any]) -> None:
    """Replace the README's tables, which stand between comments."""
    path = HERE.parent / "README.md"
    for name, render in (("figures", headline), ("whole", whole)):
        start, end = f"<!-- {name}: benchmarks/tables.py -->", f"<!-- end of {name} -->"
        before, rest = path.read_text().split(start)
        after = rest.split(end)[1]
        path.write_text(f"{before}{start}\n{render(result)}\n{end}{after}")


def main() -> None:
    """Write the page, and the README's table."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted((HERE / "results").glob("*.json"))}
    parts = [HEAD]
    if "evidence" in found:
        parts.append(evidence(found["evidence"]))
        put_headlines(found["evidence"])
    if "ablations" in found:
        parts.append(ablations(found["ablations"]))
    if scales := [result for name, result in found.items() if name.startswith("scale-")]:
        parts.append(scale(scales))
    if speeds := [result for name, result in found.items() if name.startswith("speed-")]:
        parts.append(speed(speeds))
    if results := [result for name, result in found.items() if name.startswith("faster-")]:
        parts.append(faster(results))
    parts += [show(found[name]) for name, show in OTHERS.items() if name in found]
    (HERE / "README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
