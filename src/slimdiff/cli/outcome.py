"""What `slimdiff compress` shows and writes beside the slim pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimdiff.cli import console
from slimdiff.components import absent_components, loading_call
from slimdiff.errors import SlimdiffError
from slimdiff.plan import Plan

COLUMNS = {"": "left", "dense": "right", "slim": "right", "stays": "right"}


def beside(out: Path, ending: str) -> Path:
    """OUT.ending, next to OUT."""
    return out.with_name(f"{out.name}.{ending}")


def write_page(dense: str, out: Path) -> None:
    """Name the models in the results, and render them."""
    from slimdiff.results import read, write

    path, page = beside(out, "results.json"), beside(out, "report.html")
    results = read(path)
    results["model"] |= {"dense": dense, "slim": out.name}
    write(path, results)
    write_html(results, page)


def write_html(results: dict[str, Any], page: Path) -> None:
    """Render results as a page, if matplotlib is there."""
    from slimdiff.report import write_report

    try:
        write_report(results, page)
    except SlimdiffError as error:
        console.out().print(f"no report: {error}", soft_wrap=True, markup=False)
    else:
        console.out().print(f"\n{page}: what was done, with pictures", soft_wrap=True)


def show(plan: Plan, out: Path, checkpoint: Path, model: str | None) -> None:
    """A table of what was done, how to use it, and a page of it if its `model` is named."""
    page = console.out()
    page.print(_table(plan, f"{out}: {plan.recipe}, {plan.allocation}, {plan.budget}"))
    page.print(f"statistics stay in {checkpoint}, for another budget or recipe", soft_wrap=True)
    page.print(f"saved in {out}; to use it, with slimdiff installed or without:\n", soft_wrap=True)
    page.print("  from diffusers import DiffusionPipeline", soft_wrap=True)
    call = loading_call(str(out), absent_components(out))
    page.print(f"  pipe = {call}", soft_wrap=True, markup=False)
    if recorded := _sampling(plan):
        page.print(f"  image = pipe(prompt, {recorded}).images[0]", soft_wrap=True, markup=False)
    if model is not None:
        write_page(model, out)


def _sampling(plan: Plan) -> str:
    """How calibration sampled, as arguments of the pipeline's call."""
    config = plan.figures.get("calibration", {}).get("config") or {}
    names = ("num_inference_steps", "guidance_scale", "max_sequence_length")
    given = {name: config.get(name) for name in names}
    return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)


def _table(plan: Plan, title: str) -> Any:
    from slimdiff.report import numbers
    from slimdiff.report.names import (
        COUNTS,
        ERRORS,
        FIGURES,
        figure_name,
        healed_told,
        stage_told,
    )

    figures, shown = plan.figures, console.table(title, COLUMNS)
    for key in ("params", "macs"):
        dense, slim = figures[f"{key}_dense"], figures[key]
        left = console.share(slim, dense)
        shown.add_row(FIGURES[key], console.count(dense), console.count(slim), left)
    if "latency" in figures:
        latency = figures["latency"]
        before, after = (f"{1000 * latency[key]:.1f} ms" for key in ("dense", "slim"))
        shown.add_row(FIGURES["denoiser"], before, after, f"{latency['speedup']:.2f} times faster")
    for key in ERRORS:
        if key in figures:
            ends = figures.get("error_interval", []) if key == "error_on_probes" else []
            row = (figure_name(key, figures), "", numbers.error(figures[key]))
            shown.add_row(*row, " to ".join(map(numbers.error, ends)))
    if "refit" in figures:
        before, after = figures["refit"]["before"], figures["error_on_probes"]
        layers = f"{figures['refit']['layers']} layers"
        shown.add_row(FIGURES["refit"], numbers.error(before), numbers.error(after), layers)
    if "healed" in figures:
        healed = figures["healed"]
        before, after = (numbers.error(healed[key]) for key in ("before", "after"))
        shown.add_row(FIGURES["healed"], before, after, healed_told(healed))
    for key in COUNTS:
        if figures.get(key):
            shown.add_row(FIGURES[key], "", str(figures[key]), "")
    for stage, seconds in figures["seconds"].items():
        told = stage_told(stage, f"{seconds:.1f}", figures["reused"])
        shown.add_row(f"seconds to {stage}", "", *told)
    return shown
