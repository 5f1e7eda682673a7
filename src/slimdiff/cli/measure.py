"""`slimdiff frontier` and `slimdiff profile`: what a budget would buy, before one is named."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from slimdiff import results
from slimdiff.cli import console, models, options, outcome
from slimdiff.config import CalibrationConfig

FRONTIER = """What every budget would cost: error against size and MACs, from one calibration.

Predicted for a range of budgets, measured at five of them on inputs that calibration kept, all
layers shrunk together; nothing is saved but the figures. `slimdiff compress` with the same prompts
and sampling reuses what was recorded: pass it the folder that is named at the end.

**Examples**

- `slimdiff frontier`
- `slimdiff frontier ./stable-diffusion-v1-5 --prompts captions.txt -o sd15`
- `slimdiff frontier ./model --prompts captions.txt --metric params --layers resnet`
"""

PROFILE = """How long each layer takes at each width, on this machine.

Layers run alone, on the inputs that one image gives them, at several widths in turn; attention also
with half of its heads, where heads may go. An upsampler's convolution is timed in its upsampler, as
it is and fused (it convolves before it doubles), and at the faster of both.

**Examples**

- `slimdiff profile`
- `slimdiff profile ./stable-diffusion-v1-5 --device cuda --dtype float16 --json`
"""

Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="Name for OUT.json and OUT.html.", show_default="MODEL-frontier"
    ),
]
Metric = Annotated[str, typer.Option("--metric", help="What is budgeted: macs or params.")]
Layers = Annotated[
    str | None,
    typer.Option("--layers", help="What may shrink: attention,feed_forward,resnet. Default: all."),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--statistics", help="Folder of statistics and curves.", show_default="OUT.statistics"
    ),
]


def frontier(
    model: options.Model = None,
    out: Out = None,
    prompts: options.Prompts = None,
    metric: Metric = "macs",
    layers: Layers = None,
    num_prompts: options.NumPrompts = 128,
    statistics: Folder = None,
    steps: options.Steps = 20,
    guidance: options.Guidance = None,
    text_tokens: options.TextTokens = None,
    batch_size: options.BatchSize = 4,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    variant: options.Variant = None,
) -> None:
    """Measure the frontier; `FRONTIER` is what the command line shows."""
    where = models.source(model)
    out = out or Path(f"{where.name}-frontier")
    call = models.sampling(where, guidance, text_tokens)
    config = CalibrationConfig(steps, batch_size=batch_size, seed=seed, **call)
    texts = models.prompts(where, prompts, num_prompts, "calibration")
    pipe = models.load(where, dtype, device, variant)
    folder = statistics or outcome.beside(out, "statistics")
    found = _frontier(pipe, texts, config, folder, metric, options.names(layers))
    made = {"made": results.made_by(), "model": _model(pipe, where.name), "frontier": found}
    results.write(outcome.beside(out, "json"), made)
    _show(where.name, found)
    outcome.write_html(results.read(outcome.beside(out, "json")), outcome.beside(out, "html"))
    console.out().print(f"statistics and curves: {folder}", soft_wrap=True, markup=False)


def _frontier(
    pipe: Any,
    texts: list[str],
    config: CalibrationConfig,
    folder: Path,
    metric: str,
    layers: list[str] | None,
) -> dict[str, Any]:
    from slimdiff.calibrate import calibrate
    from slimdiff.denoiser import denoiser_of
    from slimdiff.widths import frontier_of, measure_curves

    denoiser = denoiser_of(pipe)[1]
    with console.Bars() as bars:
        recorded = calibrate(pipe, texts, config, checkpoint=folder, progress=bars)
        curves = measure_curves(denoiser, recorded, layers=layers, folder=folder, progress=bars)
        how: dict[str, Any] = {"metric": metric, "layers": layers, "curves": curves}
        return frontier_of(denoiser, recorded, **how, progress=bars).section()


def _model(pipe: Any, name: str) -> dict[str, Any]:
    from slimdiff.denoiser import denoiser_of

    return {"dense": name, "class": type(denoiser_of(pipe)[1]).__name__}


def _show(name: str, found: dict[str, Any]) -> None:
    columns = ("parameters", "MACs", "faster by MACs", "error, predicted", "on probes")
    shown = console.table(f"{name}: frontier", {"": "left", **dict.fromkeys(columns, "right")})
    dense = found["dense"]
    for i, point in enumerate(found["points"]):
        measured = point["measured"]
        shown.add_row(
            "knee" if i == found["knee"] else "",
            console.share(point["params"], dense["params"]),
            console.share(point["macs"], dense["macs"]),
            f"{dense['macs'] / point['macs']:.2f}",
            f"{point['predicted']:.1e}",
            "" if measured is None else f"{measured:.1e}",
        )
    console.out().print(shown)


def profile(
    model: options.Model = None,
    layers: Layers = None,
    as_json: options.AsJson = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    variant: options.Variant = None,
) -> None:
    """Time the layers; `PROFILE` is what the command line shows."""
    pipe = models.load(models.source(model), dtype, device, variant)
    from slimdiff.denoiser import denoiser_of
    from slimdiff.evaluate.sampling import first_call
    from slimdiff.families import groups_of
    from slimdiff.profiling import profile as measure

    denoiser = denoiser_of(pipe)[1]
    groups = groups_of(denoiser, options.names(layers))
    with console.Bars() as bars:
        found = measure(denoiser, groups, first_call(pipe), progress=bars)
    if as_json:
        console.out().print_json(json.dumps(asdict(found)))
        return
    shown = console.table(
        f"one call: {1000 * found.seconds:.1f} ms, {found.machine['dtype']}, "
        f"{found.machine['threads']} threads",
        {
            "layer": "left",
            "dense, ms": "right",
            "ms at width": "left",
            "with half the heads": "right",
            "fusing spares": "right",
        },
    )
    upsamplers = {group.layer: group.upsampler for group in groups}
    for layer, times in found.layers.items():
        dense = max(times)
        narrower = ", ".join(f"{w}: {1000 * times[w]:.2f}" for w in sorted(times) if w != dense)
        halved = f"{1000 * found.of(layer, dense, 0.5):.2f}" if layer in found.fixed else ""
        spared = found.fused.get(upsamplers[layer])
        fused = "" if spared is None else f"{1000 * spared:.2f}"
        shown.add_row(layer, f"{1000 * times[dense]:.2f}", narrower, halved, fused)
    console.out().print(shown)
