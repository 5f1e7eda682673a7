"""`slimdiff evaluate`: what a slim pipeline lost and gained against the dense one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from slimdiff.cli import console, models, options
from slimdiff.errors import SlimdiffError
from slimdiff.results import write

HELP = """Measure what was lost and what was gained: dense against slim, same prompts, same seeds.

Fidelity: error of the denoiser's prediction by timestep, PSNR and SSIM of the images, Fréchet and
kernel distance between the two sets of images, CLIP score if a CLIP folder is given, and what the
judge of a bundled reference finds right. Cost: parameters, MACs, bytes, peak memory and latency,
timed in turn. Pictures are drawn without safety checker and watermark; black, flagged and
non-finite ones are left out and counted. Nothing is downloaded; what cannot be measured is said.
Use prompts that calibration has not seen; bundled references have test prompts of their own, other
models need --prompts.

The results are a JSON file, from which `slimdiff report` makes a page.

**Examples**

- `slimdiff evaluate scenes-unet scenes-unet-slim`
- `slimdiff evaluate ./stable-diffusion-v1-5 ./slim --prompts held-out.txt --num-prompts 32`
- `slimdiff evaluate ./model ./slim --prompts p.txt --clip ./clip-vit-base --features ./dinov2`
"""


NBSP = "\N{NO-BREAK SPACE}"

logger = logging.getLogger(__name__)


def _measuring(help: str, *flags: str) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel="Measuring")


ResultsOut = Annotated[Path, typer.Option("--out", "-o", help="JSON file of the results.")]
FeaturesFolder = Annotated[
    Path | None,
    _measuring(
        "Folder of a vision model of transformers (CLIP, DINOv2, ...) for the distances between "
        "images; by default the VAE's encoder.",
        "--features",
    ),
]
ClipFolder = Annotated[
    Path | None, _measuring("Folder of a CLIP model of transformers, for the CLIP score.", "--clip")
]
Runs = Annotated[int, _measuring("Timed denoiser calls of each model.", "--runs")]
PipelineRuns = Annotated[
    int, _measuring("Timed images of each pipeline; 0 leaves them out.", "--pipeline-runs")
]
Shown = Annotated[int, _measuring("Image pairs kept in the results.", "--images")]


def evaluate(
    dense: options.Dense,
    slim: options.Slim,
    prompts: options.Prompts = None,
    num_prompts: options.NumPrompts = 64,
    out: ResultsOut = Path("evaluation.json"),
    features: FeaturesFolder = None,
    clip: ClipFolder = None,
    runs: Runs = 11,
    pipeline_runs: PipelineRuns = 3,
    shown: Shown = 8,
    seed: options.ImageSeed = 0,
    steps: options.Steps = 20,
    guidance: options.Guidance = None,
    text_tokens: options.TextTokens = None,
    batch_size: options.BatchSize = 4,
    height: options.Height = None,
    width: options.Width = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    variant: options.Variant = None,
) -> None:
    """Dense against slim; `HELP` is what the command line shows."""
    if out.is_dir():
        raise SlimdiffError(f"--out {out}: is a folder; name a JSON file")
    where, there = models.source(dense), models.source(slim)
    texts = models.prompts(where, prompts, num_prompts, "test")
    out.parent.mkdir(parents=True, exist_ok=True)
    small = models.load(there, dtype, device, variant)
    call = models.sampling(where, guidance, text_tokens, small)
    from slimdiff.evaluate import Settings
    from slimdiff.evaluate import evaluate as run
    from slimdiff.evaluate.features import ClipScore, ImageModel

    settings = Settings(
        num_inference_steps=steps,
        **call,
        batch_size=batch_size,
        height=height,
        width=width,
        first_seed=seed,
        runs=runs,
        pipeline_runs=pipeline_runs,
        shown=shown,
    )
    measures: dict[str, Any] = {
        "features": None if features is None else _named("--features", ImageModel, features),
        "clip": None if clip is None else _named("--clip", ClipScore, clip),
        "judge": _judge_of(where.name) if where.bundled and prompts is None else None,
    }
    big = models.load(where, dtype, device, variant)
    warn_if_swapped(big, small, (dense, slim))
    with console.Bars() as bars:
        results = run(big, small, texts, settings, **measures, progress=bars)
    results["model"] |= {"dense": where.name, "slim": there.name}
    write(out, results)
    show(results)
    console.out().print(
        f"{out}: all results; `slimdiff report {out}` makes a page of them", soft_wrap=True
    )


def warn_if_swapped(big: Any, small: Any, names: tuple[str, str]) -> None:
    """Say so before the minutes that an evaluation takes."""
    from slimdiff import costs
    from slimdiff.denoiser import denoiser_of

    dense, slim = (costs.parameters(denoiser_of(pipe)[1]) for pipe in (big, small))
    if slim > dense:
        logger.warning(
            "warning: DENSE (%s) is smaller than SLIM (%s); were they swapped? Then it is "
            "`slimdiff evaluate %s %s`",
            *names,
            *reversed(names),
        )


def _judge_of(name: str) -> Callable[[Any, Any], dict[str, Any]]:
    """The judge of a bundled reference, in the form of results."""
    from slimdiff.reference.references import reference

    judge = reference(name).world.judge
    return lambda images, prompts: judge(images, prompts).record()


def show(results: dict[str, Any]) -> None:
    """A table of all figures, and below it why some were not measured."""
    from slimdiff.report import rows

    found = [*rows.cost(results["cost"]), *rows.fidelity(results["fidelity"])]
    model, count = results["model"], results["fidelity"]["velocity"]["prompts"]
    title = f"{model['slim']} against {model['dense']}, {count} prompts"
    shown = console.table(title, {"": "left", "dense": "right", "slim": "right", "of": "left"})
    shown.columns[-1].no_wrap = False
    for row in (row for row in found if not row.detail):
        slim = row.slim if row.reason is None else "not measured"
        shown.add_row(*(told.replace(NBSP, " ") for told in (row.name, row.dense, slim, row.note)))
    page = console.out()
    page.print(shown)
    for row in (row for row in found if row.reason is not None):
        page.print(f"{row.name} not measured: {row.reason}", soft_wrap=True, markup=False)


def _named(option: str, load: Callable[[Path], Any], folder: Path) -> Any:
    """What is loaded from a folder; errors name the option that gave it."""
    try:
        return load(folder)
    except SlimdiffError as error:
        raise SlimdiffError(f"{option} {error}") from error
