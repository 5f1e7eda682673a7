"""`slimdiff compress`: the main job."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from slimdiff.budget import Budget
from slimdiff.cli import compress_options as own
from slimdiff.cli import console, models, options, outcome
from slimdiff.config import CalibrationConfig, recipe_named
from slimdiff.denoiser import ENCODERS, NAMES
from slimdiff.errors import SlimdiffError
from slimdiff.plan import Plan

DEFAULT_SHARE = "0.9"


HELP = """Make a pipeline smaller, without training, and save it as a folder that diffusers loads.

The prompts run through the pipeline as you would sample it, while second moments of activations are
recorded. Every attention, feed-forward and ResNet layer gets a width under the budget, and its
smaller weights follow in closed form.

With `--component text_encoder` a CLIP or T5 text encoder is slimmed instead. It only reads the
prompts; the budget is its own. Denoiser and encoders of a pipeline can be slimmed one after the
other.

A run that was interrupted goes on from its last finished batch when the same command is given
again. Another budget or recipe reuses the recorded statistics, if prompts and sampling (batch size
and seed too) are the same.

A pipeline that is slim already can be slimmed again; shares are then of what it has by now.

With `--heal MINUTES` the slim denoiser is trained afterwards to predict what the dense one does
for these prompts, along trajectories that the dense pipeline samples; one prompt in ten is held out
to judge by. It stops by itself when the error no longer falls, and keeps the best weights.

An earlier slim pipeline in OUT is replaced once the new one is complete; other folders are refused.

**Examples**

- `slimdiff compress`
- `slimdiff compress ./stable-diffusion-v1-5 --prompts captions.txt --remove 100M`
- `slimdiff compress ./model --prompts captions.txt --macs 0.6 -o m6 --statistics m7.statistics`
- `slimdiff compress ./model --prompts captions.txt --speedup 1.5`
- `slimdiff compress ./model --prompts captions.txt --quality 1e-3`
- `slimdiff compress ./model --prompts captions.txt --macs 0.5 --heal 30`
- `slimdiff compress owner/name --prompts captions.txt --macs 0.7 -o slim --device cuda`
- `slimdiff compress ./model --prompts captions.txt --component text_encoder --params 0.7 -o out`
- `slimdiff compress ./model --prompts captions.txt --plan slim/unet/slimdiff.json -o edited`
- `slimdiff compress ./model --low-memory --statistics from-gpu.statistics --memory 16GB`
"""


def compress(
    model: options.Model = None,
    out: own.Out = None,
    component: options.Component = None,
    prompts: options.Prompts = None,
    params: options.Params = None,
    macs: options.Macs = None,
    remove: options.Remove = None,
    memory: options.Memory = None,
    speedup: options.Speedup = None,
    latency: options.Latency = None,
    quality: options.Quality = None,
    plan: own.PlanFile = None,
    recipe: own.RecipeName = "slimdiff",
    allocation: own.AllocationName = None,
    temperature: own.Temperature = 0.3,
    untied: own.Untied = False,
    multiple: own.Multiple = 8,
    head_multiple: own.HeadMultiple = 1,
    block_kinds: own.BlockKinds = None,
    remove_layers: own.RemoveLayers = True,
    layers: own.Layers = None,
    refit: own.Refit = None,
    heal: own.Heal = None,
    num_prompts: own.NumPrompts = 256,
    steps_per_prompt: own.StepsPerPrompt = 5,
    timestep_weights: own.Weights = "uniform",
    num_probes: own.NumProbes = 32,
    statistics: own.Checkpoint = None,
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
    low_memory: own.LowMemory = False,
    report: own.Report = True,
    pictures: own.Pictures = 4,
) -> None:
    """The main job; `HELP` is what the command line shows."""
    where = models.source(model)
    out = _usable(where, out or Path(f"{where.name}-slim"), component)
    choices = (recipe, allocation, untied, multiple, temperature, component, low_memory)
    budgets = (params, macs, remove, memory, speedup, latency, quality)
    job = _how(plan, budgets, layers, *choices) | {"heal": heal, "refit": refit}
    if low_memory:
        return _stream(where, out, statistics, job, variant)
    call = models.sampling(where, guidance, text_tokens) | {"height": height, "width": width}
    call |= {"batch_size": batch_size, "num_probes": num_probes, "num_inference_steps": steps}
    call |= {"steps_per_prompt": steps_per_prompt, "timestep_weights": timestep_weights}
    job |= {"config": CalibrationConfig(**call, seed=seed)}
    job |= {"remove_layers": remove_layers, "head_multiple": head_multiple}
    job |= _beside(out, statistics, pictures if report else None) | {"block_kinds": block_kinds}
    texts = models.prompts(where, prompts, num_prompts, "calibration")
    done = _run(where, out, texts, job, dtype=dtype, device=device, variant=variant)
    outcome.show(done, out, job["checkpoint"], where.name if report else None)


def _beside(out: Path, statistics: Path | None, pictures: int | None) -> dict[str, Any]:
    """Where statistics and results go; no results without a number of pictures."""
    found: dict[str, Any] = {"checkpoint": statistics or outcome.beside(out, "statistics")}
    if pictures is not None:
        found |= {"results": outcome.beside(out, "results.json"), "pictures": pictures}
    return found


def _run(
    where: models.Source, out: Path, texts: list[str], job: dict[str, Any], **loading: Any
) -> Plan:
    """Load, compress, save."""
    from slimdiff import pipeline
    from slimdiff.cli import saving
    from slimdiff.denoiser import component_of
    from slimdiff.stored import saving_of

    pipe, variant = models.load(where, **loading), loading["variant"]
    origins, keep = saving.folders(where, pipe, variant), loading["dtype"] == "auto"
    name, module = component_of(pipe, job["component"])
    if name in origins:
        found = saving_of(module, origins[name], variant)
        job["saving"] = found if keep else replace(found, dtypes={})
    with console.Bars() as bars:
        done = pipeline.compress(pipe, texts, **job, progress=bars)
    saving.save(pipe, out, origins if keep else {}, variant, name)
    return done


def _stream(
    where: models.Source,
    out: Path,
    statistics: Path | None,
    job: dict[str, Any],
    variant: str | None,
) -> None:
    """Block by block, from shards to shards."""
    from slimdiff.low_memory import compress_folder

    if statistics is None:
        raise SlimdiffError("--low-memory runs nothing: name --statistics that were recorded")
    if not Path(where.path).is_dir():
        raise SlimdiffError(f"{where.path}: --low-memory reads a folder; download the model first")
    if job["component"] in ENCODERS:
        raise SlimdiffError("--low-memory is for denoisers; leave it out for a text encoder")
    if job["heal"] is not None:
        raise SlimdiffError("--low-memory runs nothing, so nothing can be healed: leave out --heal")
    if job["refit"]:
        raise SlimdiffError("--low-memory runs nothing, so nothing can be refit: leave out --refit")
    unknown = ("temperature", "component", "heal", "refit")
    job = {name: value for name, value in job.items() if name not in unknown}
    with console.Bars() as bars:
        more = job | {"variant": variant, "progress": bars}
        plan = compress_folder(where.path, out, statistics, **more)
    outcome.show(plan, out, statistics, None)


def _how(
    plan: Path | None,
    budgets: tuple[str | None, ...],
    layers: str | None,
    recipe: str,
    allocation: str | None,
    untied: bool,
    multiple: int,
    temperature: float,
    component: str | None,
    low_memory: bool,
) -> dict[str, Any]:
    """Arguments of `slimdiff.compress`, checked before anything is loaded."""
    from slimdiff.bundles import Allocation

    own_choice = "uniform" if low_memory else recipe_named(recipe).allocation
    chosen = Allocation(allocation or own_choice, not untied, multiple, temperature)
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
        "component": component,
    }


def _usable(where: models.Source, out: Path, component: str | None) -> Path:
    """`out`, unless something else would be lost or nothing gained."""
    if component not in (None, *NAMES, *ENCODERS):
        raise SlimdiffError(
            f"--component is {component!r}, expected one of {', '.join((*NAMES, *ENCODERS))}"
        )
    if out.resolve() == Path(where.path).resolve():
        raise SlimdiffError(f"--out {out}: is the model itself; name another folder")
    if out.exists() and not (out / "model_index.json").is_file() and any(out.iterdir()):
        raise SlimdiffError(f"--out {out}: exists and is no pipeline; name another folder")
    return out
