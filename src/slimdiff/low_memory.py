"""Compression of a pipeline whose denoiser does not fit in memory, from statistics that exist."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimdiff import costs
from slimdiff.budget import Budget
from slimdiff.errors import SlimdiffError
from slimdiff.families import groups_of
from slimdiff.plan import Plan
from slimdiff.planning import by_hand
from slimdiff.probes import Probes
from slimdiff.shards import Shards
from slimdiff.statistics import Statistics
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
    denoiser = _typed(on_meta(component), Shards(component, variant))
    refuse_slim(denoiser)
    stored = Statistics.open(statistics)
    _cast(stored.probes, next(denoiser.parameters()).dtype)
    if (budget is None) == (plan is None):
        raise SlimdiffError("give either a budget or a plan")
    if budget is not None:
        _refuse_forwards(budget, allocation)
        how: dict[str, Any] = {"recipe": recipe, "tied": tied, "multiple": multiple}
        more = how | {"layers": layers, "allocation": "uniform", "curves": {}}
        plan = allocate(denoiser, stored, budget, **more)
    else:
        assert plan is not None
        groups = groups_of(denoiser)
        probes = stored.probes.batches(1)
        call = probes[0] if probes else costs.example_inputs(denoiser)
        counted = costs.measure(denoiser, groups, call, plan.fused)
        plan = by_hand(plan, groups, counted)
    plan.figures["calibration"] = stored.source
    begun = time.perf_counter()
    options: dict[str, Any] = {"variant": variant, "progress": progress}
    rewrite_pipeline_folder(folder, out, stored, plan, **options)
    seconds = {"rewrite": time.perf_counter() - begun}
    return replace(plan, figures=plan.figures | {"seconds": seconds, "reused": []})


def _typed(denoiser: nn.Module, shards: Shards) -> nn.Module:
    """In the dtype of the weights on disk: budgets of memory count with it."""
    first = next(name for name, _ in denoiser.named_parameters())
    return nn.Module.to(
        denoiser, shards.read(first).dtype
    )  # diffusers' own warns about float32 parts


def _cast(probes: Probes, dtype: torch.dtype) -> None:
    """Probes may have been kept in another dtype than the weights have on disk."""
    for probe in probes.rows.values():
        for name, tensor in probe.tensors.items():
            if tensor.is_floating_point() and tensor.ndim > 1:
                probe.tensors[name] = tensor.to(dtype)


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
