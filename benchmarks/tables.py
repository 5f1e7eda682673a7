"""Render benchmarks/README.md from the JSON in benchmarks/results/.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
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


def recipes(result: dict[str, Any]) -> str:
    """Recipes side by side on the reference pipeline."""
    dense = result["dense"]

    def accuracy(row: dict[str, Any]) -> str:
        low, high = row["interval"]
        return f"{row['scene_accuracy']:.1%} ({low:.1%} to {high:.1%})"

    rows = [["dense", "", "0 %", "", accuracy(dense), "", ""]] + [
        [
            row["recipe"],
            row["allocation"],
            f"{row['removed_share']:.0%}",
            f"{row['velocity_error']:.2e}",
            accuracy(row),
            f"{row['psnr']:.1f} dB",
            f"{row['ssim']:.4f}",
        ]
        for row in sorted(result["rows"], key=lambda row: row["removed_share"])
    ]
    head = ("recipe", "allocation", "removed", "velocity error", "scene accuracy", "PSNR", "SSIM")
    return (
        f"## Recipes on {result['model']}\n\n"
        f"Share removed of the {result['removable_params']:,} parameters of attention and "
        f"feed-forward (the denoiser has {dense['params']:,}). One calibration on "
        f"{result['calibration_prompts']} prompts for all rows; velocity error on "
        f"{result['error_prompts']} and the rest on {result['test_prompts']} held-out test "
        f"prompts, PSNR and SSIM to the dense images of the same seeds.\n\n"
        f"{table(head, rows)}\n\n{made_by(result)}\n"
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


def main() -> None:
    """Write the page."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted((HERE / "results").glob("*.json"))}
    parts = [HEAD]
    parts += [recipes(result) for name, result in found.items() if name.startswith("recipes")]
    if scales := [result for name, result in found.items() if name.startswith("scale-")]:
        parts.append(scale(scales))
    (HERE / "README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
