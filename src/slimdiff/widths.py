"""Widths: error curves of all groups, and the plan that a budget makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from slimdiff import costs as costs_
from slimdiff.budget import Budget
from slimdiff.bundles import Allocation
from slimdiff.config import Recipe, recipe_named
from slimdiff.curve_file import CurveFile
from slimdiff.curves import ErrorCurve, error_curves, probes_of
from slimdiff.errors import SlimdiffError
from slimdiff.families import groups_of
from slimdiff.fitting import fit_error, fit_speedup, measured_error, timed
from slimdiff.frontier import Frontier, frontier
from slimdiff.plan import Plan
from slimdiff.planning import least_nanoseconds, make_plan, refuse_unfit, smallest_count
from slimdiff.profiling import profile
from slimdiff.rewrite import refuse_slim
from slimdiff.statistics import Statistics

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
    """
    chosen = recipe_named(recipe)
    probed = (allocation or chosen.allocation) == "probed"
    kept = None if folder is None else CurveFile(folder, statistics, chosen, probed=probed)
    return error_curves(
        denoiser,
        groups_of(denoiser, layers or chosen.layers),
        statistics,
        chosen,
        probed=probed,
        known=kept.load() if kept else None,
        keep=kept.save if kept else None,
        progress=progress,
    )


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
    remove_layers: bool = True,
    layers: Sequence[str] | None = None,
    curves: Mapping[str, ErrorCurve] | None = None,
    timed_rows: int = 2,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """A width for every group under `budget`; the denoiser is not changed.

    Args:
        denoiser: dense, of a known family.
        statistics: recorded from it.
        budget: what the whole denoiser may hold: never exceeded, met within one width step; or
            how fast it is to be, or what it may lose: plans are then measured and made again.
        recipe: `slimdiff`, `paper` or `magnitude`: how groups are decomposed.
        allocation: `probed`, `entropic`, `uniform` or `threshold`; by default the recipe's own.
        tied: the two halves of an attention layer share one width, which keeps the stock
            attention processors; untied layers use slimdiff's own processor.
        multiple: widths are multiples of this where the layer allows it.
        temperature: of the entropic allocation.
        remove_layers: let whole layers go, and put out their mean, where the probed allocation
            finds that best; statistics without means keep all layers.
        layers: what may shrink: some of `attention`, `feed_forward` and `resnet`; by default all
            that the recipe knows (`paper` and `magnitude` leave ResNets alone).
        curves: from `measure_curves`; measured here if not given.
        timed_rows: rows of the call whose time is budgeted, at most as many as there are probes;
            two is one image with guidance.
        folder: where a profile of the layers' times is kept, for budgets that are a time.
        progress: called with (stage, groups done, groups in all).

    Raises:
        SlimdiffError: an impossible budget (says the best possible), statistics of another model,
            an unknown recipe or allocation.
    """
    refuse_slim(denoiser)
    chosen = recipe_named(recipe)
    settings = Allocation(allocation or chosen.allocation, tied, multiple, temperature)
    refuse_unfit(budget, chosen, settings)
    if curves is None:
        curves = measure_curves(
            denoiser, statistics, recipe, allocation, layers=layers, progress=progress
        )
    job = _Job(denoiser, statistics, budget, chosen, settings, layers, curves, remove_layers)
    if budget.metric == "latency":
        return _as_fast(job, timed_rows, folder, progress)
    if budget.largest_error is not None:
        return _as_good(job, budget.largest_error)
    return job.plan()


class _Job:
    """What every plan of one call of `allocate` has in common."""

    def __init__(
        self,
        denoiser: nn.Module,
        statistics: Statistics,
        budget: Budget,
        recipe: Recipe,
        settings: Allocation,
        layers: Sequence[str] | None,
        curves: Mapping[str, ErrorCurve],
        remove_layers: bool,
    ) -> None:
        probe = statistics.probes.batches(1)
        inputs = probe[0] if probe else costs_.example_inputs(denoiser)
        self.denoiser, self.statistics, self.curves = denoiser, statistics, curves
        self.groups = groups_of(denoiser, layers or recipe.layers)
        measured = {name for name, curve in curves.items() if curve.removed is not None}
        may_go = {g.layer for g in self.groups if remove_layers and g.name in measured}
        self.budget, self.recipe = budget, recipe
        self.settings = replace(settings, removable=frozenset(may_go))
        self.costs = costs_.measure(denoiser, self.groups, inputs)

    def plan(self, **limits: Any) -> Plan:
        """The plan under the budget, or under other limits (see `make_plan`)."""
        bytes_each = next(self.denoiser.parameters()).element_size()
        plan = make_plan(
            type(self.denoiser).__name__,
            self.groups,
            self.costs,
            self.curves,
            self.statistics,
            self.budget.in_parameters(bytes_each),
            self.recipe,
            self.settings,
            **limits,
        )
        return replace(plan, budget=self.budget.describe())


def frontier_of(
    denoiser: nn.Module,
    statistics: Statistics,
    *,
    metric: str = "macs",
    recipe: str = "slimdiff",
    tied: bool = True,
    multiple: int = 8,
    remove_layers: bool = True,
    layers: Sequence[str] | None = None,
    curves: Mapping[str, ErrorCurve] | None = None,
    progress: Progress | None = None,
) -> Frontier:
    """Predicted and measured error against size, from dense to the smallest widths.

    Args:
        denoiser: dense; it is not changed.
        statistics: recorded from it.
        metric: what is budgeted: `params` or `macs`.
        recipe, tied, multiple, remove_layers, layers, curves: see `allocate`. The least size is
            that at which no layer is removed.
        progress: called with (stage, done, in all).

    Raises:
        SlimdiffError: as `allocate` does; or an unknown metric.
    """
    if metric not in ("params", "macs"):
        raise SlimdiffError(f"metric is {metric!r}, expected params or macs")
    refuse_slim(denoiser)
    chosen, settings = recipe_named(recipe), Allocation("probed", tied, multiple)
    budget = Budget(params=1.0) if metric == "params" else Budget(macs=1.0)
    refuse_unfit(budget, chosen, settings)
    how: dict[str, Any] = {"layers": layers, "progress": progress}
    curves = curves or measure_curves(denoiser, statistics, recipe, "probed", **how)
    job = _Job(denoiser, statistics, budget, chosen, settings, layers, curves, remove_layers)
    probes = probes_of(denoiser, statistics)
    return frontier(
        lambda limit: job.plan(limit=limit),
        lambda plan: measured_error(probes, job.groups, statistics, plan, curves),
        job.costs.total(metric),
        smallest_count(job.groups, job.costs, metric, chosen, settings),
        metric,
        progress,
    )


def _as_fast(job: _Job, rows: int, folder: str | Path | None, progress: Progress | None) -> Plan:
    device = next(job.denoiser.parameters()).device
    call = next(iter(job.statistics.probes.batches(rows, device)), None)
    if call is None:
        raise SlimdiffError("the statistics hold no probes to time; record with num_probes")
    multiple = job.settings.multiple
    times = profile(
        job.denoiser, job.groups, call, multiple=multiple, folder=folder, progress=progress
    )
    dense = times.dense_nanoseconds
    return fit_speedup(
        lambda limit: job.plan(profile=times, limit=limit),
        lambda plan: timed(job.denoiser, job.groups, plan, call),
        dense,
        least_nanoseconds(job.groups, job.recipe, job.settings, times),
        dense / job.budget.limit(dense),
    )


def _as_good(job: _Job, largest: float) -> Plan:
    probes = probes_of(job.denoiser, job.statistics)
    return fit_error(
        lambda goal: job.plan(largest_error=goal),
        lambda plan: measured_error(probes, job.groups, job.statistics, plan, job.curves),
        largest,
    )
