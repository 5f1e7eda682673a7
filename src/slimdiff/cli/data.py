"""`slimdiff select-prompts` and `slimdiff statistics`: what goes into a calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from slimdiff.cli import console, models, options
from slimdiff.prompts import read_prompts, write_prompts

SELECT = """Choose the prompts of a pool that say most about a pipeline.

Each prompt is run through the first denoising steps; its signature is how the denoiser's layers
respond to it. Prompts are taken greedily by what their signature adds to those already taken, so
near-duplicates are not taken twice.

**Examples**

- `slimdiff select-prompts captions.txt -n 500 -o slimset.txt --model ./stable-diffusion-v1-5`
- `slimdiff select-prompts captions.txt -n 100 -o few.json --steps 1`
"""

SHOW = """Show what a folder of statistics holds.

**Example**

- `slimdiff statistics show scenes-unet-slim.statistics`
"""

MERGE = """Add statistics of several runs up: those of all their prompts together.

Give each run other prompts and another `--seed`; then `slimdiff compress ... --statistics OUT`
cannot resume from the sum, but `slimdiff.allocate` and `slimdiff.rewrite` take it.

**Example**

- `slimdiff statistics merge all.statistics machine1.statistics machine2.statistics`
"""

statistics = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

Pool = Annotated[Path, typer.Argument(help="File of prompts to choose from.")]
Count = Annotated[int, typer.Option("-n", "--num", help="How many prompts to choose.")]
Chosen = Annotated[Path, typer.Option("--out", "-o", help="File for the chosen prompts.")]
PoolModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A diffusers folder, a hub id, or the name of a bundled reference.",
        show_default="scenes-unet",
    ),
]
PoolSteps = Annotated[
    int, typer.Option("--steps", help="Denoising steps that each prompt is run through.")
]
Folder = Annotated[Path, typer.Argument(help="Folder of statistics.")]
Parts = Annotated[list[Path], typer.Argument(help="Folders of statistics to add up.")]
Sum = Annotated[Path, typer.Argument(help="Folder for the sum.")]


def select_prompts(
    pool: Pool,
    count: Count = 500,
    out: Chosen = Path("slimset.txt"),
    model: PoolModel = None,
    steps: PoolSteps = 2,
    batch_size: options.BatchSize = 4,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    variant: options.Variant = None,
) -> None:
    """Choose from a pool; `SELECT` is what the command line shows."""
    texts = read_prompts(pool)
    pipe = models.load(models.source(model), dtype, device, variant)
    from slimdiff.signatures import select_prompts as run

    with console.Bars() as bars:
        prompts, chosen = run(
            pipe, texts, count, steps=steps, batch_size=batch_size, seed=seed, progress=bars
        )
    write_prompts(out, prompts)
    low, high = min(chosen.scores), max(chosen.scores)
    message = f"{len(prompts)} of {len(texts)} prompts, influence {low:.3f} to {high:.3f}"
    console.out().print(f"{out}: {message}", soft_wrap=True)


@statistics.command("show", help=SHOW)
def show(folder: Folder, as_json: options.AsJson = False) -> None:
    """What a folder of statistics holds."""
    from slimdiff.statistics import Statistics

    found = Statistics.load(folder)
    facts = summary(found)
    if as_json:
        console.out().print_json(json.dumps(facts | {"source": found.source}))
        return
    shown = console.table(str(folder), {"": "left", "value": "right"})
    for name, value in facts.items():
        shown.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console.out().print(shown)


@statistics.command("merge", help=MERGE)
def merge(out: Sum, parts: Parts) -> None:
    """Write the sum of the parts."""
    from slimdiff.statistics import Statistics

    merged = Statistics.merge([Statistics.load(part) for part in parts])
    merged.save(out)
    console.out().print(
        f"{out}: {len(parts)} parts, {merged.batches} batches, {merged.calls} denoiser calls",
        soft_wrap=True,
    )


def summary(found: Any) -> dict[str, Any]:
    """Facts about statistics, for a person or as JSON."""
    parts = _parts(found.source)
    return {
        "denoiser": found.denoiser,
        "prompts": sum(part.get("prompts", 0) for part in parts),
        "batches": found.batches,
        "denoiser calls": found.calls,
        "probes": len(found.probes.rows),
        "sums": len(found.sums),
        "megabytes": sum(total.nbytes for total in found.sums.values()) // 10**6,
        "parts": len(parts),
    } | _sampling(parts)


def _sampling(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """How the runs were sampled, where all of them were sampled alike."""
    shown = {
        "num_inference_steps": "steps",
        "guidance_scale": "guidance",
        "max_sequence_length": "text-tokens",
    }
    shown |= {"batch_size": "batch size", "seed": "seed", "timestep_weights": "timestep weights"}
    found = {}
    for key, name in shown.items():
        values = {str(part["config"].get(key)) for part in parts if part.get("config")}
        if values:
            found[name] = ", ".join(sorted(values))
    return found


def _parts(source: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that a source is made of: merged statistics may hold merged ones."""
    return (
        [run for part in source["merged"] for run in _parts(part)]
        if "merged" in source
        else [source]
    )
