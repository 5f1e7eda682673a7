"""The stages in order: calibrate, allocate, decompose, rewrite. Read this first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from slimdiff import costs as costs_
from slimdiff.budget import Budget
from slimdiff.bundles import Allocation
from slimdiff.calibrate import calibrate
from slimdiff.config import CalibrationConfig, recipe_named
from slimdiff.curves import ErrorCurve, probes_of
from slimdiff.denoiser import denoiser_of
from slimdiff.errors import SlimdiffError
from slimdiff.evaluate.sampling import first_call, one_row_of
from slimdiff.families import groups_of
from slimdiff.journal import Journal
from slimdiff.plan import Plan
from slimdiff.planning import by_hand, check_budget, refuse_unfit
from slimdiff.rewrite import refuse_slim, rewrite
from slimdiff.statistics import Statistics
from slimdiff.widths import allocate, measure_curves

Progress = Callable[[str, int, int], None]

logger = logging.getLogger(__name__)


def compress(
    pipe: Any,
    prompts: Sequence[str],
    budget: Budget | None = None,
    *,
    plan: Plan | None = None,
    recipe: str = "slimdiff",
    allocation: str | None = None,
    tied: bool = True,
    multiple: int = 8,
    temperature: float = 0.3,
    layers: Sequence[str] | None = None,
    config: CalibrationConfig | None = None,
    checkpoint: str | Path | None = None,
    results: str | Path | None = None,
    pictures: int = 4,
    progress: Progress | None = None,
) -> Plan:
    """Slim the denoiser of `pipe` in place, and return the plan with its figures.

    Args:
        pipe: a diffusers pipeline with a dense denoiser of a known family.
        prompts: calibration prompts; a few hundred of the kind that the model will be given.
        budget: what the whole denoiser may hold afterwards; not with `plan`.
        plan: widths to use instead of allocating them.
        recipe, allocation, tied, multiple, temperature, layers: see `allocate`.
        config: how calibration samples.
        checkpoint: folder to save statistics and error curves to, and to resume from.
        results: file to write what was done to, for `slimdiff report`; with it, images of the first
            prompts are drawn before and after.
        pictures: how many.
        progress: called with (stage, done, in all).

    Raises:
        SlimdiffError: an impossible budget (says the smallest possible), no prompts, an unknown or
            already slim denoiser, NaN or infinity in an activation.
    """
    denoiser = denoiser_of(pipe)[1]
    config = config or CalibrationConfig()
    how: dict[str, Any] = {"recipe": recipe, "allocation": allocation, "layers": layers}
    finer: dict[str, Any] = {"tied": tied, "multiple": multiple, "temperature": temperature}
    _refuse_impossible(pipe, config, budget, plan, how | finer)
    settings = {"budget": budget} | how | finer
    journal = Journal(pipe, list(prompts), config, results, pictures if results else 0, settings)
    journal.draw("dense")
    progress = journal.noting(progress)
    with journal.timed("calibrate"):
        statistics = calibrate(pipe, prompts, config, checkpoint=checkpoint, progress=progress)
    curves: dict[str, ErrorCurve] = {}
    kept: dict[str, Any] = {"folder": checkpoint, "progress": progress}
    if budget is not None:
        with journal.timed("allocate"):
            curves = measure_curves(denoiser, statistics, **how, **kept)
            more = how | finer | kept | {"curves": curves}
            plan = allocate(denoiser, statistics, budget, **more)
    else:
        assert plan is not None
        plan = _given(denoiser, statistics, plan)
    _finish(journal, statistics, plan, curves, progress)
    return plan


def _given(denoiser: nn.Module, statistics: Statistics, plan: Plan) -> Plan:
    groups = groups_of(denoiser)
    probe = statistics.probes.batches(1)[0]
    return by_hand(plan, groups, costs_.measure(denoiser, groups, probe))


def _finish(
    journal: Journal,
    statistics: Statistics,
    plan: Plan,
    curves: Mapping[str, ErrorCurve],
    progress: Progress | None,
) -> None:
    """Rewrite the denoiser, add what was measured to the plan's figures, write the results."""
    name, denoiser = denoiser_of(journal.pipe)
    probed = probes_of(denoiser, statistics)
    journal.account(statistics, plan, curves)
    with journal.timed("rewrite"):
        rewrite(denoiser, statistics, plan, curves=curves, progress=progress)
    setattr(journal.pipe, name, denoiser)  # the pipeline notes the class that it will be saved as
    plan.figures["error_on_probes"] = probed.error({})
    plan.figures["seconds"] = journal.seconds
    plan.figures["reused"] = journal.reused
    plan.figures["calibration"] = statistics.source
    journal.draw("slim")
    journal.write(plan)


def _refuse_impossible(
    pipe: Any,
    config: CalibrationConfig,
    budget: Budget | None,
    plan: Plan | None,
    how: dict[str, Any],
) -> None:
    """Raise for what cannot work before minutes are spent on calibration."""
    denoiser = denoiser_of(pipe)[1]
    refuse_slim(denoiser)
    if (budget is None) == (plan is None):
        raise SlimdiffError("give either a budget or a plan")
    recipe = recipe_named(how["recipe"])
    groups = groups_of(denoiser, how["layers"] or recipe.layers)
    if plan is not None:
        plan.check(groups_of(denoiser))
    if budget is not None:
        name = how["allocation"] or recipe.allocation
        settings = Allocation(name, how["tied"], how["multiple"], how["temperature"])
        call = one_row_of(first_call(pipe, **config.sampling))
        costs = costs_.measure(denoiser, groups, call)
        refuse_unfit(budget, recipe, settings)
        if budget.metric != "latency" and budget.largest_error is None:
            bytes_each = next(denoiser.parameters()).element_size()
            check_budget(groups, costs, budget.in_parameters(bytes_each), recipe, settings)
