"""`slimdiff evaluate`: what a slim pipeline lost and gained against the dense one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from slimdiff.cli import console, models, options
from slimdiff.cli.images import Dense, Slim
from slimdiff.errors import SlimdiffError

HELP = """Measure what was lost and what was gained: dense against slim, same prompts, same seeds.

Fidelity: error of the denoiser's prediction by timestep, PSNR and SSIM of the images, Fréchet and
kernel distance between the two sets of images, CLIP score if a CLIP folder is given, scene accuracy
on the bundled reference. Cost: parameters, MACs, bytes, peak memory and latency, timed in turn.
Nothing is downloaded; what cannot be measured is said. Use prompts that calibration has not seen;
the bundled reference has test prompts of its own, other models need --prompts.

The results are a JSON file, from which `slimdiff report` makes a page.

**Examples**

- `slimdiff evaluate scenes-unet scenes-unet-slim`
- `slimdiff evaluate ./stable-diffusion-v1-5 ./slim --prompts held-out.txt --num-prompts 32`
- `slimdiff evaluate ./model ./slim --prompts p.txt --clip ./clip-vit-base --features ./dinov2`
"""


def _measuring(help: str, *flags: str) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel="Measuring")


NumPrompts = Annotated[
    int, typer.Option("--num-prompts", help="How many prompts to use, from the start of the file.")
]
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
    dense: Dense,
    slim: Slim,
    prompts: options.Prompts = None,
    num_prompts: NumPrompts = 64,
    out: ResultsOut = Path("evaluation.json"),
    features: FeaturesFolder = None,
    clip: ClipFolder = None,
    runs: Runs = 11,
    pipeline_runs: PipelineRuns = 3,
    shown: Shown = 8,
    seed: options.ImageSeed = 0,
    steps: options.Steps = 20,
    guidance: options.Guidance = None,
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
    guidance = models.guidance(guidance, where, small)
    from slimdiff.evaluate import Settings
    from slimdiff.evaluate import evaluate as run
    from slimdiff.evaluate.features import ClipScore, ImageModel
    from slimdiff.results import write

    settings = Settings(
        num_inference_steps=steps,
        guidance_scale=guidance,
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
        "judge": _judge if where.bundled and prompts is None else None,
    }
    big = models.load(where, dtype, device, variant)
    with console.Bars() as bars:
        results = run(big, small, texts, settings, **measures, progress=bars)
    results["model"] |= {"dense": where.name, "slim": there.name}
    write(out, results)
    page = console.out()
    page.print(_table(results))
    for reason in _reasons(results):
        page.print(reason, soft_wrap=True, markup=False)
    page.print(f"{out}: all results; `slimdiff report {out}` makes a page of them", soft_wrap=True)


def _judge(images: Any, prompts: Any) -> dict[str, Any]:
    """Scene accuracy of the bundled reference, in the form of results."""
    from slimdiff.metrics import wilson
    from slimdiff.reference.judge import scene_accuracy

    found, count = scene_accuracy(images, prompts), len(prompts)
    attributes = {
        name: {"share": share, "interval": list(wilson(round(share * count), count))}
        for name, share in found.shares.items()
    }
    return {
        "whole": found.whole,
        "interval": list(found.interval),
        "attributes": attributes,
        "count": count,
    }


def _table(results: dict[str, Any]) -> Any:
    columns = {"": "left", **dict.fromkeys(("dense", "slim", "slim / dense"), "right")}
    model = results["model"]
    count = results["fidelity"]["velocity"]["prompts"]
    title = f"{model['slim']} against {model['dense']}, {count} prompts"
    shown = console.table(title, columns)
    for row in [*_cost_rows(results["cost"]), *_fidelity_rows(results["fidelity"])]:
        shown.add_row(*row)
    return shown


def _cost_rows(cost: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for key, name in (
        ("params", "parameters"),
        ("macs", "MACs of one forward"),
        ("bytes", "files of the denoiser, bytes"),
        ("peak_memory", "peak bytes in a call"),
    ):
        found = cost[key]
        if "unavailable" in found:
            rows.append((name, "", "not measured", ""))
            continue
        share = console.share(found["slim"], found["dense"])
        rows.append((name, console.count(found["dense"]), console.count(found["slim"]), share))
    for found in cost["latency"].values():
        seconds = [f"{found[label] * 1000:.1f} ms" for label in ("dense", "slim")]
        rows.append((found["of"], *seconds, f"{found['speedup']:.2f} x faster"))
    if "macs_allow" in cost:
        share = f"{100 * cost['share_reached']:.0f} % reached"
        rows.append(("the MACs allow, for a call", "", f"{cost['macs_allow']:.2f} x", share))
    return rows


def _fidelity_rows(fidelity: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    error = fidelity["velocity"]["relative"]
    rows.append(("velocity error (relative, squared)", "", f"{error:.2e}", ""))
    for key, field, name in (
        ("images", "psnr", "PSNR to the dense images, dB"),
        ("images", "ssim", "SSIM to the dense images"),
        ("frechet", "value", "Fréchet distance"),
        ("kernel", "value", "kernel distance"),
    ):
        found = fidelity[key]
        told = "not measured" if "unavailable" in found else f"{found[field]:.4g}"
        rows.append((name, "", told, found.get("features", "")))
    rows.append(_both("CLIP score", fidelity["clip"], lambda value: f"{value:.2f}"))
    rows.append(_both("scene accuracy (95 %)", fidelity["scenes"], _accuracy))
    return rows


def _both(name: str, found: dict[str, Any], show: Any) -> tuple[str, ...]:
    if "unavailable" in found:
        return (name, "", "not measured", "")
    return (name, show(found["dense"]), show(found["slim"]), found.get("model", ""))


def _reasons(results: dict[str, Any]) -> list[str]:
    """What to know about the table: why some figures are not there, and a doubtful order."""
    parts = {**results["cost"], **results["fidelity"]}
    params = results["cost"]["params"]
    swapped = ["the second pipeline is the larger one: is it evaluate DENSE SLIM?"]
    few = _few(results["fidelity"]["frechet"])
    return (
        (swapped if params["slim"] > params["dense"] else [])
        + few
        + [
            f"{name} not measured: {found['unavailable']}"
            for name, found in parts.items()
            if isinstance(found, dict) and "unavailable" in found
        ]
    )


def _few(frechet: dict[str, Any]) -> list[str]:
    """A Fréchet distance needs more images than features."""
    count, dimensions = frechet.get("count", 0), frechet.get("dimensions", 0)
    if count >= dimensions:
        return []
    return [f"Fréchet distance: of {count} images and {dimensions} features, too few to rely on"]


def _accuracy(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['whole']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _named(option: str, load: Callable[[Path], Any], folder: Path) -> Any:
    """What is loaded from a folder; errors name the option that gave it."""
    try:
        return load(folder)
    except SlimdiffError as error:
        raise SlimdiffError(f"{option} {error}") from error
