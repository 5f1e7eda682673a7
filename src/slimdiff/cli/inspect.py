"""`slimdiff inspect`: what a denoiser's groups are and what they cost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from slimdiff.cli import console, models, options
from slimdiff.report.names import kind_name

HELP = """Show what can shrink in a pipeline's denoiser or text encoder, and what it costs.

A group is a set of layers that shrink together: the query and key, or the value and output
projections of an attention layer, the two linears of a feed-forward layer, the inner channels of a
ResNet, a modulation, or a projection of the residual stream (a shortcut, a down- or upsampling
convolution, the way into and out of a transformer). MACs are those of one forward at batch 1 and
the pipeline's own image size; a plan counts those of the size that it was calibrated with. A slim
pipeline shows its present widths, and layers that were removed.

**Examples**

- `slimdiff inspect`
- `slimdiff inspect ./stable-diffusion-v1-5`
- `slimdiff inspect scenes-unet-slim --json`
- `slimdiff inspect --component text_encoder`
"""


@dataclass(frozen=True)
class Row:
    """One group: its present width, parameters, MACs, and its share of all parameters."""

    name: str
    kind: str
    heads: int
    width: int
    params: int
    macs: int
    share: float


def inspect(
    model: options.Model = None,
    component: options.Component = None,
    as_json: options.AsJson = False,
    variant: options.Variant = None,
) -> None:
    """What the denoiser is made of; `HELP` is what the command line shows."""
    where = models.source(model)
    pipe = models.load(where, "auto", "cpu", variant)
    from slimdiff.denoiser import component_of

    name, denoiser = component_of(pipe, component)
    inputs = _inputs(pipe, component, models.sampling(where, None, None, pipe))
    rows, totals = measure(denoiser, inputs)
    if as_json:
        groups = [vars(row) for row in rows]
        report = {"denoiser": type(denoiser).__name__, **totals, "groups": groups}
        console.out().print_json(json.dumps(report | {"kept": _kept(denoiser)}))
    else:
        _show(f"{type(denoiser).__name__} ({name})", rows, totals, component or "denoiser")
        if inputs is not None:
            console.out().print(f"MACs are those of a call with {_shapes(inputs)}.")
        for what, why in _kept(denoiser).items():
            console.out().print(f"Does not shrink, where there are any: {what}; {why}.")


def _shapes(inputs: dict[str, Any]) -> str:
    sizes = {name: getattr(value, "shape", ()) for name, value in inputs.items()}
    return ", ".join(f"{name} {tuple(size)}" for name, size in sizes.items() if len(size) > 1)


def _kept(denoiser: Any) -> dict[str, str]:
    """What the family leaves alone, and why."""
    from slimdiff.families import family_of

    return dict(family_of(denoiser).kept)


def _inputs(pipe: Any, component: str | None, call: dict[str, Any]) -> dict[str, Any] | None:
    """What the pipeline passes to the component; None if it takes more than a prompt."""
    from slimdiff.evaluate.sampling import first_call, one_row_of

    try:
        return one_row_of(first_call(pipe, component=component, **call))
    except (TypeError, ValueError, RuntimeError):
        return None


def measure(
    denoiser: Any, inputs: dict[str, Any] | None = None
) -> tuple[list[Row], dict[str, int]]:
    """A row for each group, and the whole denoiser's `params` and `macs`.

    MACs are those of `inputs`, by default of the model's native size and 77 text tokens.
    """
    from slimdiff import costs
    from slimdiff.families import groups_of
    from slimdiff.removal import removed_from
    from slimdiff.report.names import REMOVED

    groups = groups_of(denoiser)
    found = costs.measure(denoiser, groups, inputs or costs.example_inputs(denoiser))
    rows = []
    for group in groups:
        cost, inner = found.groups[group.name], group.heads * group.width
        params = cost.of("params", inner) + cost.fixed
        macs = cost.of("macs", inner)
        share = params / found.params
        rows.append(Row(group.name, group.kind, group.heads, group.width, params, macs, share))
    for path, channels in removed_from(denoiser).items():
        rows.append(Row(path, REMOVED, 0, 0, channels, 0, channels / found.params))
    return rows, {"params": found.params, "macs": found.macs}


def _show(title: str, rows: list[Row], totals: dict[str, int], whole: str) -> None:
    from slimdiff.report.names import width_name

    right = dict.fromkeys(("heads", "width", "parameters", "MACs", "share"), "right")
    shown = console.table(title, {"group": "left", "kind": "left", **right})
    for row in rows:
        shown.add_row(
            row.name,
            kind_name(row.kind),
            str(row.heads),
            width_name(row.width),
            console.count(row.params),
            console.count(row.macs),
            console.share(row.params, totals["params"]),
        )
    shown.add_section()
    for name, params, macs in (
        (
            f"{len(rows)} groups",
            sum(row.params for row in rows),
            sum(row.macs for row in rows),
        ),
        (f"whole {whole}", totals["params"], totals["macs"]),
    ):
        part = console.share(params, totals["params"])
        shown.add_row(name, "", "", "", console.count(params), console.count(macs), part)
    console.out().print(shown)
