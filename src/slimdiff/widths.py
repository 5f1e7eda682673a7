"""Widths: error curves of all groups, and the plan that a budget makes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from slimdiff.budget import Budget, Saving
from slimdiff.bundles import Allocation
from slimdiff.choosing import best_of
from slimdiff.composition import earlier_record
from slimdiff.config import recipe_named
from slimdiff.curve_file import CurveFile
from slimdiff.curves import ErrorCurve, error_curves
from slimdiff.digest import refuse_other_model
from slimdiff.errors import SlimdiffError
from slimdiff.families import groups_of
from slimdiff.frontier import Frontier, frontier
from slimdiff.heads import measure_heads
from slimdiff.jobs import Job, as_fast, as_good
from slimdiff.plan import Plan
from slimdiff.planning import refuse_unfit
from slimdiff.prices import remaining, smallest_count
from slimdiff.statistics import Statistics
from slimdiff.wrapped import refuse_offloaded

Progress = Callable[[str, int, int], None]


def measure_curves(
    denoiser: nn.Module,
    statistics: Statistics,
    recipe: str = "slimdiff",
    allocation: str | None = None,
    *,
    layers: Sequence[str] | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, ErrorCurve]:
    """Error curves of all groups, with gains if the allocation needs them.

    They do not depend on the budget: several plans can be made from the same curves. With `folder`
    they are kept there, and not measured again.

    Raises:
        SlimdiffError: statistics of another model.
    """
    refuse_offloaded(denoiser)
    refuse_other_model(statistics.source, dict(denoiser.named_parameters()))
    chosen = recipe_named(recipe)
    probed = (allocation or chosen.allocation) == "probed"
    how: dict[str, Any] = {"probed": probed, "denoiser": denoiser}
    kept = None if folder is None else CurveFile(folder, statistics, chosen, **how)
    keep = kept.save if kept else None
    groups = groups_of(denoiser, layers or chosen.layers)
    found = error_curves(
        denoiser,
        groups,
        statistics,
        chosen,
        probed=probed,
        known=kept.load() if kept else None,
        keep=keep,
        progress=progress,
    )
    if not probed:
        return found
    return measure_heads(denoiser, groups, statistics, chosen, found, keep, progress)


def allocate(
    denoiser: nn.Module,
    statistics: Statistics,
    budget: Budget,
    *,
    recipe: str = "slimdiff",
    allocation: str | None = None,
    tied: bool = True,
    multiple: int = 8,
    temperature: float = 0.3,
    head_multiple: int = 1,
    block_kinds: int | None = None,
    remove_layers: bool = True,
    layers: Sequence[str] | None = None,
    curves: Mapping[str, ErrorCurve] | None = None,
    saving: Saving | None = None,
    timed_rows: int = 2,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """A width for every group under `budget`; the denoiser is not changed.

    Args:
        denoiser, statistics: of a known family, dense or slim already; recorded from it.
        budget: what the whole denoiser may hold, in shares of what it holds now: never exceeded,
            met within one width step; or how fast it is to be, or what it may lose: plans are then
            measured and made again.
        recipe, allocation: `slimdiff`, `paper` or `magnitude`: how groups are decomposed; `probed`,
            `entropic`, `uniform` or `threshold`, by default the recipe's own.
        tied: both halves of an attention layer share one width, which keeps stock processors.
        multiple: widths are multiples of this where the layer allows it.
        temperature: of the entropic allocation.
        head_multiple: where heads go, as many stay as divide by this: ranks that share them.
        block_kinds: of like blocks, so many sets of widths at most: few graphs to compile.
        remove_layers: let whole layers (they put out their mean) and heads go where that is best.
        layers: what may shrink, such as `attention`; by default all that the recipe knows.
        curves: from `measure_curves`; measured here if not given.
        saving: how it will be saved, if not as it stands; budgets of memory count so.
        timed_rows: rows of the call whose time is budgeted; two is one image with guidance.
        folder: where a profile of the layers' times is kept.
        progress: called with (stage, groups done, groups in all).

    Raises:
        SlimdiffError: an impossible budget (says the best possible), statistics of another model,
            an unknown recipe or allocation, a slim denoiser without plan and maps, a cache.
    """
    refuse_offloaded(denoiser)
    earlier_record(denoiser)
    chosen = recipe_named(recipe)
    how = (allocation or chosen.allocation, tied, multiple, temperature)
    settings = Allocation(*how, head_multiple=head_multiple, block_kinds=block_kinds)
    refuse_unfit(budget, chosen, settings, groups_of(denoiser, layers or chosen.layers))
    if curves is None:
        own: dict[str, Any] = {"layers": layers, "progress": progress}
        curves = measure_curves(denoiser, statistics, recipe, allocation, **own)
    job = Job(denoiser, statistics, budget, chosen, settings, layers, curves, saving)
    fit: Callable[[Job], Plan] = Job.plan if budget.largest_error is None else as_good
    if budget.metric == "latency":
        job, fit = as_fast(job, timed_rows, folder, progress)
    return best_of(job, fit, remove=remove_layers, progress=progress)


def frontier_of(
    denoiser: nn.Module,
    statistics: Statistics,
    *,
    metric: str = "macs",
    recipe: str = "slimdiff",
    tied: bool = True,
    multiple: int = 8,
    layers: Sequence[str] | None = None,
    curves: Mapping[str, ErrorCurve] | None = None,
    progress: Progress | None = None,
) -> Frontier:
    """Predicted and measured error against size, from dense to the smallest widths.

    No layer and no head goes wholly: down there errors no longer add up as predicted.

    Args:
        denoiser: it is not changed; errors are relative to what it puts out now.
        statistics: recorded from it.
        metric: what is budgeted: `params` or `macs`.
        recipe, tied, multiple, layers, curves: see `allocate`.
        progress: called with (stage, done, in all).

    Raises:
        SlimdiffError: as `allocate` does; or an unknown metric.
    """
    if metric not in ("params", "macs"):
        raise SlimdiffError(f"metric is {metric!r}, expected params or macs")
    chosen, settings = recipe_named(recipe), Allocation("probed", tied, multiple)
    budget = Budget(params=1.0) if metric == "params" else Budget(macs=1.0)
    refuse_unfit(budget, chosen, settings)
    how: dict[str, Any] = {"layers": layers, "progress": progress}
    curves = curves or measure_curves(denoiser, statistics, recipe, "probed", **how)
    job = Job(denoiser, statistics, budget, chosen, settings, layers, curves)
    return frontier(
        lambda limit: job.plan(limit=limit),
        functools.partial(job.lost, guided=True),
        remaining(job.costs, metric),
        smallest_count(job.groups, job.costs, metric, chosen, settings),
        metric,
        progress,
    )
