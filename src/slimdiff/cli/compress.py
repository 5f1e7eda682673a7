"""`slimdiff compress`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimdiff.cli import console, models, options, outcome
from slimdiff.config import Budget, CalibrationConfig, recipe_named
from slimdiff.denoiser import NAMES
from slimdiff.errors import SlimdiffError
from slimdiff.plan import Plan

PLAN_FILE = "slimdiff.json"
DEFAULT_SHARE = "0.9"


def _budget(help: str, *flags: str) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel="Budget (one of them)")


def _recipe(help: str, *flags: str) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel="Recipe")


def _calibration(help: str, *flags: str) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel="Calibration")


Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder of the slim pipeline.", show_default="MODEL-slim"),
]
Params = Annotated[
    str | None,
    _budget("Parameters that stay: a share (0.8) or a count (700M). 0.9 if no budget.", "--params"),
]
Macs = Annotated[
    str | None, _budget("Multiply-accumulates of one forward that stay: 0.7 or 300G.", "--macs")
]
Remove = Annotated[str | None, _budget("Parameters that go: 0.2 or 100M.", "--remove")]
PlanFile = Annotated[
    Path | None, _budget("Plan file with the widths to use, instead of a budget.", "--plan")
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
recorded. Every attention and feed-forward layer gets a width under the budget, and its smaller
weights follow in closed form.

A run that was interrupted goes on from its last finished batch when the same command is given
again. Another budget or recipe reuses the recorded statistics, if prompts and sampling (batch size
and seed too) are the same.

An earlier slim pipeline in OUT is replaced once the new one is complete; other folders are refused.

**Examples**

- `slimdiff compress`
- `slimdiff compress ./stable-diffusion-v1-5 --prompts captions.txt --remove 100M`
- `slimdiff compress ./model --prompts captions.txt --macs 0.6 -o m6 --statistics m7.statistics`
- `slimdiff compress owner/name --prompts captions.txt --macs 0.7 -o slim --device cuda`
- `slimdiff compress ./model --prompts captions.txt --plan slim/unet/slimdiff.json -o edited`
"""


def compress(
    model: options.Model = None,
    out: Out = None,
    prompts: options.Prompts = None,
    params: Params = None,
    macs: Macs = None,
    remove: Remove = None,
    plan: PlanFile = None,
    recipe: RecipeName = "slimdiff",
    allocation: AllocationName = None,
    temperature: Temperature = 0.3,
    untied: Untied = False,
    multiple: Multiple = 8,
    num_prompts: NumPrompts = 128,
    timestep_weights: Weights = "uniform",
    num_probes: NumProbes = 16,
    statistics: Checkpoint = None,
    steps: options.Steps = 20,
    guidance: options.Guidance = None,
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
    out = Path(f"{where.name}-slim") if out is None else out
    _refuse_unusable(where, out)
    job = _how(plan, (params, macs, remove), recipe, allocation, untied, multiple, temperature)
    config = CalibrationConfig(
        num_inference_steps=steps,
        guidance_scale=where.guidance if guidance is None else guidance,
        batch_size=batch_size,
        seed=seed,
        height=height,
        width=width,
        num_probes=num_probes,
        timestep_weights=timestep_weights,  # type: ignore[arg-type]
    )
    texts = models.prompts(where, prompts, num_prompts, "calibration")
    checkpoint = statistics or outcome.beside(out, "statistics")
    pipe = models.load(where, dtype, device, variant)
    stored = models.stored_dtypes(where, pipe, variant) if dtype == "auto" else {}
    from slimdiff import pipeline

    if report:
        job |= {"results": outcome.beside(out, "results.json"), "pictures": pictures}
    with console.Bars() as bars:
        job |= {"config": config, "checkpoint": checkpoint, "progress": bars}
        done = pipeline.compress(pipe, texts, **job)
    _save(pipe, out, stored, variant)
    outcome.show(done, out, checkpoint)
    if report:
        outcome.write_page(where.name, out)


def _how(
    plan: Path | None,
    budgets: tuple[str | None, str | None, str | None],
    recipe: str,
    allocation: str | None,
    untied: bool,
    multiple: int,
    temperature: float,
) -> dict[str, Any]:
    """Arguments of `slimdiff.compress`, checked before anything is loaded."""
    from slimdiff.planning import Allocation

    chosen = Allocation(
        allocation or recipe_named(recipe).allocation, not untied, multiple, temperature
    )
    given = dict(zip(("params", "macs", "remove"), budgets, strict=True))
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
