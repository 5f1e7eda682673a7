"""The stages in order: calibrate, allocate, decompose, rewrite. Read this first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from slimdiff import costs as costs_
from slimdiff.calibrate import calibrate
from slimdiff.config import Budget, CalibrationConfig, recipe_named
from slimdiff.curve_file import CurveFile
from slimdiff.curves import ErrorCurve, error_curves, probes_of
from slimdiff.denoiser import denoiser_of
from slimdiff.errors import SlimdiffError
from slimdiff.evaluate.sampling import first_call, one_row_of
from slimdiff.families import groups_of
from slimdiff.journal import Journal
from slimdiff.plan import Plan
from slimdiff.planning import Allocation, check_budget, counted, make_plan
from slimdiff.rewrite import refuse_slim, rewrite
from slimdiff.statistics import Statistics

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
        recipe, allocation, tied, multiple, temperature: see `allocate`.
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
    how: dict[str, Any] = {"recipe": recipe, "allocation": allocation}
    finer: dict[str, Any] = {"tied": tied, "multiple": multiple, "temperature": temperature}
    _refuse_impossible(pipe, config, budget, plan, how | finer)
    journal = Journal(pipe, list(prompts), config, results, pictures if results else 0)
    journal.draw("dense")
    with journal.timed("calibrate"):
        statistics = calibrate(pipe, prompts, config, checkpoint=checkpoint, progress=progress)
    curves: dict[str, ErrorCurve] = {}
    if plan is None:
        assert budget is not None
        with journal.timed("allocate"):
            curves = measure_curves(
                denoiser, statistics, **how, folder=checkpoint, progress=progress
            )
            plan = allocate(denoiser, statistics, budget, **how, **finer, curves=curves)
    else:
        plan = _given(denoiser, statistics, plan)
    _finish(journal, statistics, plan, curves, progress)
    return plan


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
    plan.figures["calibration"] = statistics.source
    journal.draw("slim")
    journal.write(plan)


def _given(denoiser: nn.Module, statistics: Statistics, plan: Plan) -> Plan:
    """A plan that was passed in, with figures of its own widths."""
    groups = groups_of(denoiser)
    costs = costs_.measure(denoiser, groups, statistics.probes.batches(1)[0])
    figures = counted(groups, costs, plan.entries)
    return replace(plan, allocation="by hand", budget="--plan", figures=figures)


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
    groups, recipe = groups_of(denoiser), recipe_named(how["recipe"])
    if plan is not None:
        plan.check(groups)
    if budget is not None:
        name = how["allocation"] or recipe.allocation
        settings = Allocation(name, how["tied"], how["multiple"], how["temperature"])
        call = one_row_of(first_call(pipe, **config.sampling))
        costs = costs_.measure(denoiser, groups, call)
        check_budget(groups, costs, budget, recipe, settings)


def measure_curves(
    denoiser: nn.Module,
    statistics: Statistics,
    recipe: str = "slimdiff",
    allocation: str | None = None,
    *,
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
        groups_of(denoiser),
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
    curves: Mapping[str, ErrorCurve] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """A width for every group under `budget`; the denoiser is not changed.

    Args:
        denoiser: dense, of a known family.
        statistics: recorded from it.
        budget: what the whole denoiser may hold; never exceeded, met within one width step.
        recipe: `slimdiff`, `paper` or `magnitude`: how groups are decomposed.
        allocation: `probed`, `entropic`, `uniform` or `threshold`; by default the recipe's own.
        tied: the two halves of an attention layer share one width, which keeps the stock
            attention processors; untied layers use slimdiff's own processor.
        multiple: widths are multiples of this where the layer allows it.
        temperature: of the entropic allocation.
        curves: from `measure_curves`; measured here if not given.
        progress: called with (stage, groups done, groups in all).

    Raises:
        SlimdiffError: an impossible budget (says the smallest possible), statistics of another
            model, an unknown recipe or allocation.
    """
    refuse_slim(denoiser)
    chosen = recipe_named(recipe)
    if curves is None:
        curves = measure_curves(denoiser, statistics, recipe, allocation, progress=progress)
    groups = groups_of(denoiser)
    probe = statistics.probes.batches(1)
    inputs = probe[0] if probe else costs_.example_inputs(denoiser)
    costs = costs_.measure(denoiser, groups, inputs)
    settings = Allocation(allocation or chosen.allocation, tied, multiple, temperature)
    name = type(denoiser).__name__
    return make_plan(name, groups, costs, curves, statistics, budget, chosen, settings)
