"""Options of `slimdiff compress` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimdiff.cli import options


def recipe(help: str, *flags: str) -> Any:
    """An option of the panel of recipes."""
    return typer.Option(*flags, help=help, rich_help_panel="Recipe")


def calibration(help: str, *flags: str) -> Any:
    """An option of the panel of calibration."""
    return typer.Option(*flags, help=help, rich_help_panel="Calibration")


Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder of the slim pipeline.", show_default="MODEL-slim"),
]
PlanFile = Annotated[
    Path | None, options.budget("Plan file with the widths to use, instead of a budget.", "--plan")
]
RecipeName = Annotated[
    str,
    recipe(
        "slimdiff: smallest error. paper: SlimDiff's decompositions. magnitude: whole heads and "
        "hidden units of small activations go, nothing is refit.",
        "--recipe",
    ),
]
AllocationName = Annotated[
    str | None,
    recipe(
        "How widths are shared out: probed (measured on kept inputs), entropic, uniform or "
        "threshold. Default: the recipe's own.",
        "--allocation",
    ),
]
Temperature = Annotated[float, recipe("Of the entropic allocation.", "--temperature")]
Untied = Annotated[
    bool,
    recipe(
        "Let query-key and value-output widths of an attention layer differ: a little less error, "
        "but an attention processor of slimdiff's own.",
        "--untied",
    ),
]
Layers = Annotated[
    str | None,
    recipe(
        "What may shrink, separated by commas: attention, feed_forward, resnet, modulation, "
        "projection. Default: the recipe's own (slimdiff: all).",
        "--layers",
    ),
]
Multiple = Annotated[int, recipe("Widths are multiples of this where they can be.", "--multiple")]
HeadMultiple = Annotated[
    int,
    recipe(
        "Where attention heads go, as many stay as divide by this: the number of ranks that share "
        "them.",
        "--head-multiple",
    ),
]
BlockKinds = Annotated[
    int | None,
    recipe(
        "Of like transformer blocks, this many sets of widths at most: fewer graphs to compile.",
        "--block-kinds",
    ),
]
RemoveLayers = Annotated[
    bool,
    recipe(
        "Let whole layers (they then put out their mean) and whole attention heads go where that "
        "loses least, or only narrow them.",
        "--remove-layers/--keep-layers",
    ),
]
Refit = Annotated[
    bool | None,
    recipe(
        "Solve weights anew on the slim model's own inputs, so that each layer mends what was lost "
        "before it. Default: if held-out prompts lose more than 1e-4.",
        "--refit/--no-refit",
    ),
]
Heal = Annotated[
    float | None,
    recipe(
        "Minutes to train the slim denoiser for afterwards, so that it predicts what the dense one "
        "does for the same prompts; needs no images, and memory for both. Default: not at all.",
        "--heal",
    ),
]
NumPrompts = Annotated[
    int, calibration("How many prompts to use, from the start of the file.", "--num-prompts")
]
StepsPerPrompt = Annotated[
    int,
    calibration(
        "Denoising steps that most prompts run through: more prompts say more than more steps of "
        "each. Held-out prompts, and one batch in 16, run through all --steps.",
        "--steps-per-prompt",
    ),
]
Weights = Annotated[
    str,
    calibration("uniform, or log: early denoising steps weigh more.", "--timestep-weights"),
]
NumProbes = Annotated[
    int,
    calibration(
        "Points of held-out trajectories kept: half to choose widths by, half to judge by.",
        "--num-probes",
    ),
]
Checkpoint = Annotated[
    Path | None,
    calibration(
        "Folder that statistics and error curves are saved to as they come, and resumed from. "
        "Default: OUT.statistics.",
        "--statistics",
    ),
]
Report = Annotated[
    bool,
    typer.Option(
        "--report/--no-report",
        help="Write OUT.results.json and, as a page with pictures, OUT.report.html.",
    ),
]
Pictures = Annotated[
    int, typer.Option("--pictures", help="Prompts drawn before and after, for the report.")
]
LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="Rewrite MODEL (a folder) block by block without running it, for a denoiser that does "
        "not fit in memory. Needs --statistics that were recorded elsewhere, and a --plan or a "
        "budget of parameters, MACs or memory, which every layer then shares alike.",
    ),
]
