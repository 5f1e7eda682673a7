"""`slimdiff compress`: the main job."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from slimdiff.budget import Budget
from slimdiff.cli import console, models, options, outcome
from slimdiff.config import CalibrationConfig, recipe_named
from slimdiff.denoiser import NAMES
from slimdiff.errors import SlimdiffError
from slimdiff.plan import Plan

PLAN_FILE = "slimdiff.json"
DEFAULT_SHARE = "0.9"


def _recipe(help: str, *flags: str) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel="Recipe")


def _calibration(help: str, *flags: str) -> Any:
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
    _recipe(
        "slimdiff: smallest error. paper: SlimDiff's decompositions. magnitude: whole heads and "
        "hidden units of small activations go, nothing is refit.",
        "--recipe",
    ),
]
AllocationName = Annotated[
    str | None,
    _recipe(
        "How widths are shared out: probed (measured on kept inputs), entropic, uniform or "
        "threshold. Default: the recipe's own.",
        "--allocation",
    ),
]
Temperature = Annotated[float, _recipe("Of the entropic allocation.", "--temperature")]
Untied = Annotated[
    bool,
    _recipe(
        "Let query-key and value-output widths of an attention layer differ: a little less error, "
        "but an attention processor of slimdiff's own.",
        "--untied",
    ),
]
Layers = Annotated[
    str | None,
    _recipe(
        "What may shrink, separated by commas: attention, feed_forward, resnet. Default: the "
        "recipe's own (slimdiff: all).",
        "--layers",
    ),
]
Multiple = Annotated[int, _recipe("Widths are multiples of this where they can be.", "--multiple")]
NumPrompts = Annotated[
    int, _calibration("How many prompts to use, from the start of the file.", "--num-prompts")
]
Weights = Annotated[
    str,
    _calibration("uniform, or log: early denoising steps weigh more.", "--timestep-weights"),
]
NumProbes = Annotated[
    int, _calibration("Denoiser inputs kept to measure errors on.", "--num-probes")
]
Checkpoint = Annotated[
    Path | None,
    _calibration(
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


HELP = """Make a pipeline smaller, without training, and save it as a folder that diffusers loads.

The prompts run through the pipeline as you would sample it, while second moments of activations are
recorded. Every attention, feed-forward and ResNet layer gets a width under the budget, and its
smaller weights follow in closed form.

A run that was interrupted goes on from its last finished batch when the same command is given
again. Another budget or recipe reuses the recorded statistics, if prompts and sampling (batch size
and seed too) are the same.

An earlier slim pipeline in OUT is replaced once the new one is complete; other folders are refused.

**Examples**

- `slimdiff compress`
- `slimdiff compress ./stable-diffusion-v1-5 --prompts captions.txt --remove 100M`
- `slimdiff compress ./model --prompts captions.txt --macs 0.6 -o m6 --statistics m7.statistics`
- `slimdiff compress ./model --prompts captions.txt --speedup 1.5`
- `slimdiff compress ./model --prompts captions.txt --quality 1e-3`
- `slimdiff compress owner/name --prompts captions.txt --macs 0.7 -o slim --device cuda`
- `slimdiff compress ./model --prompts captions.txt --plan slim/unet/slimdiff.json -o edited`
"""


def compress(
    model: options.Model = None,
    out: Out = None,
    prompts: options.Prompts = None,
    params: options.Params = None,
    macs: options.Macs = None,
    remove: options.Remove = None,
    memory: options.Memory = None,
    speedup: options.Speedup = None,
    latency: options.Latency = None,
    quality: options.Quality = None,
    plan: PlanFile = None,
    recipe: RecipeName = "slimdiff",
    allocation: AllocationName = None,
    temperature: Temperature = 0.3,
    untied: Untied = False,
    multiple: Multiple = 8,
    layers: Layers = None,
    num_prompts: NumPrompts = 128,
    timestep_weights: Weights = "uniform",
    num_probes: NumProbes = 16,
    statistics: Checkpoint = None,
    steps: options.Steps = 20,
    guidance: options.Guidance = None,
    text_tokens: options.TextTokens = None,
    batch_size: options.BatchSize = 4,
    seed: options.Seed = 0,
    height: options.Height = None,
    width: options.Width = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    variant: options.Variant = None,
    report: Report = True,
    pictures: Pictures = 4,
) -> None:
    """The main job; `HELP` is what the command line shows."""
    where = models.source(model)
    out = out or Path(f"{where.name}-slim")
    _refuse_unusable(where, out)
    budgets = (params, macs, remove, memory, speedup, latency, quality)
    job = _how(plan, budgets, layers, recipe, allocation, untied, multiple, temperature)
    config = CalibrationConfig(
        num_inference_steps=steps,
        **models.sampling(where, guidance, text_tokens),
        batch_size=batch_size,
        seed=seed,
        height=height,
        width=width,
        num_probes=num_probes,
        timestep_weights=timestep_weights,  # type: ignore[arg-type]  # refused if unknown
    )
    texts = models.prompts(where, prompts, num_prompts, "calibration")
    checkpoint = statistics or outcome.beside(out, "statistics")
    if report:
        job |= {"results": outcome.beside(out, "results.json"), "pictures": pictures}
    pipe = models.load(where, dtype, device, variant)
    stored = models.stored_dtypes(where, pipe, variant) if dtype == "auto" else {}
    done = _run(pipe, texts, job | {"config": config, "checkpoint": checkpoint})
    _save(pipe, out, stored, variant)
    outcome.show(done, out, checkpoint, where.name if report else None)


def _run(pipe: Any, texts: list[str], job: dict[str, Any]) -> Plan:
    from slimdiff import pipeline

    with console.Bars() as bars:
        return pipeline.compress(pipe, texts, **job, progress=bars)


def _how(
    plan: Path | None,
    budgets: tuple[str | None, ...],
    layers: str | None,
    recipe: str,
    allocation: str | None,
    untied: bool,
    multiple: int,
    temperature: float,
) -> dict[str, Any]:
    """Arguments of `slimdiff.compress`, checked before anything is loaded."""
    from slimdiff.bundles import Allocation

    chosen = Allocation(
        allocation or recipe_named(recipe).allocation, not untied, multiple, temperature
    )
    given = dict(zip((field.name for field in fields(Budget)), budgets, strict=True))
    if plan is not None and any(given.values()):
        raise SlimdiffError("--plan has widths already: give either --plan or a budget")
    if not any(given.values()):
        given["params"] = DEFAULT_SHARE
    return {
        "budget": None if plan else Budget(**given),
        "plan": Plan.read(plan) if plan else None,
        "recipe": recipe,
        "allocation": chosen.name,
        "tied": chosen.tied,
        "multiple": chosen.multiple,
        "temperature": chosen.temperature,
        "layers": options.names(layers),
    }


def _refuse_unusable(where: models.Source, out: Path) -> None:
    if out.resolve() == Path(where.path).resolve():
        raise SlimdiffError(f"--out {out}: is the model itself; name another folder")
    if out.exists() and not (out / "model_index.json").is_file() and any(out.iterdir()):
        raise SlimdiffError(f"--out {out}: exists and is no pipeline; name another folder")
    for name in NAMES:
        if (Path(where.path) / name / PLAN_FILE).is_file():
            raise SlimdiffError(
                f"{where.path}: is slim already; start from the dense model, with a smaller budget"
            )


def _save(pipe: Any, out: Path, stored: dict[str, Any], variant: str | None) -> None:
    """Save with the 16-bit dtypes that components had on disk."""
    from slimdiff.checkpoint import save_pipeline

    for name, kind in stored.items():
        getattr(pipe, name).to(kind)
    save_pipeline(pipe, out, variant=variant)
