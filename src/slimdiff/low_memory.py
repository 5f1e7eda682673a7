"""Compression of a pipeline whose denoiser does not fit in memory, from statistics that exist."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimdiff import costs
from slimdiff.budget import Budget
from slimdiff.errors import SlimdiffError
from slimdiff.families import groups_of
from slimdiff.plan import Plan
from slimdiff.planning import by_hand
from slimdiff.statistics import Statistics
from slimdiff.stored import saving_of
from slimdiff.streaming import denoiser_folder, on_meta, refuse_slim, rewrite_pipeline_folder
from slimdiff.widths import allocate

Progress = Callable[[str, int, int], None]


def compress_folder(
    folder: str | Path,
    out: str | Path,
    statistics: str | Path,
    budget: Budget | None = None,
    *,
    plan: Plan | None = None,
    recipe: str = "slimdiff",
    allocation: str = "uniform",
    tied: bool = True,
    multiple: int = 8,
    layers: Sequence[str] | None = None,
    variant: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Slim a pipeline's folder into another, one block in memory at a time; returns the plan.

    No forward pass is run: statistics come from another machine or another day, and widths from a
    plan or from the uniform allocation. Slim denoisers are slimmed again by `slimdiff.compress`.

    Args:
        folder: of a pipeline with a dense denoiser of a known family, in safetensors.
        out: a new folder, an empty one, or that of a pipeline, which is replaced.
        statistics: folder that `calibrate` wrote for this denoiser.
        budget: parameters, MACs or memory; not with `plan`.
        plan: widths to use.
        recipe, tied, multiple, layers: see `allocate`.
        allocation: `uniform`; the others need forward passes.
        variant: as in diffusers, of what is read and written.
        progress: called with ("rewrite", groups done, groups in all).

    Raises:
        SlimdiffError: an impossible budget, one that needs forward passes, an allocation that does;
            otherwise as `rewrite_pipeline_folder`.
    """
    component = denoiser_folder(folder)
    denoiser = on_meta(component)
    refuse_slim(denoiser)
    saving = saving_of(denoiser, component, variant)
    stored = Statistics.open(statistics)
    if (budget is None) == (plan is None):
        raise SlimdiffError("give either a budget or a plan")
    if budget is not None:
        _refuse_forwards(budget, allocation)
        how: dict[str, Any] = {"recipe": recipe, "tied": tied, "multiple": multiple}
        how |= {"layers": layers, "allocation": "uniform", "curves": {}, "saving": saving}
        plan = allocate(denoiser, stored, budget, **how)
    else:
        assert plan is not None
        groups = groups_of(denoiser)
        probes = stored.probes.batches(1)
        call = probes[0] if probes else costs.example_inputs(denoiser)
        counted = costs.measure(denoiser, groups, call, plan.fused, saving)
        plan = by_hand(plan, groups, counted)
    plan.figures["calibration"] = stored.source
    begun = time.perf_counter()
    options: dict[str, Any] = {"variant": variant, "progress": progress}
    rewrite_pipeline_folder(folder, out, stored, plan, **options)
    seconds = {"rewrite": time.perf_counter() - begun}
    return replace(plan, figures=plan.figures | {"seconds": seconds, "reused": []})


def _refuse_forwards(budget: Budget, allocation: str) -> None:
    if budget.metric == "latency" or budget.largest_error is not None:
        raise SlimdiffError(
            "in low memory nothing is run, so neither time nor error is measured; choose "
            "parameters, MACs or memory"
        )
    if allocation != "uniform":
        raise SlimdiffError(
            f"allocation {allocation} needs the denoiser in memory; in low memory choose uniform, "
            f"or a plan that was made elsewhere"
        )
