"""The stages in order: calibrate, allocate, decompose, rewrite. Read this first."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from slimdiff import costs as costs_
from slimdiff.budget import Budget, Saving
from slimdiff.bundles import Allocation
from slimdiff.calibrate import calibrate
from slimdiff.composition import composed_plan, earlier_record
from slimdiff.config import CalibrationConfig, recipe_named
from slimdiff.curves import ErrorCurve
from slimdiff.denoiser import ENCODERS, component_of
from slimdiff.errors import SlimdiffError
from slimdiff.evaluate.sampling import first_call, one_row_of
from slimdiff.families import groups_of
from slimdiff.heal import check_heal, heal_slimmed
from slimdiff.held_out import HeldOut
from slimdiff.journal import Journal
from slimdiff.plan import Plan
from slimdiff.planning import by_hand, check_budget, refuse_unfit
from slimdiff.refitting.stage import check_refit, may_refit, refit_slimmed
from slimdiff.removal import check_removed, removable_layers
from slimdiff.rewrite import rewrite
from slimdiff.statistics import Statistics
from slimdiff.upsamplers import fused_for
from slimdiff.widths import allocate, measure_curves
from slimdiff.wrapped import refuse_replaced

Progress = Callable[[str, int, int], None]

BEYOND = 1.05
"""By how much an error may exceed its budget without a word."""

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
    head_multiple: int = 1,
    block_kinds: int | None = None,
    temperature: float = 0.3,
    remove_layers: bool = True,
    layers: Sequence[str] | None = None,
    component: str | None = None,
    config: CalibrationConfig | None = None,
    refit: bool | None = None,
    heal: float | None = None,
    checkpoint: str | Path | None = None,
    results: str | Path | None = None,
    pictures: int = 4,
    saving: Saving | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Slim the denoiser of `pipe` in place, and return the plan with its figures.

    Args:
        pipe, prompts: a diffusers pipeline, dense or slim; a few hundred prompts as its users give.
        budget, plan: what may stay, or the widths to use. Recipe to layers, saving: see `allocate`.
        component, config: a text encoder to slim instead, of its own budget; how to sample.
        refit, heal: see `slimdiff.refit` (None: where that pays), `slimdiff.heal` (in minutes).
        checkpoint, progress: folder to save to and resume from; called with (stage, done, in all).
        results, pictures: file for `slimdiff report`, and how many prompts are drawn for it.

    Raises:
        SlimdiffError: an impossible budget, no prompts, an unknown denoiser, NaN or infinity.
    """
    denoiser, config = component_of(pipe, component)[1], config or CalibrationConfig()
    how: dict[str, Any] = {"recipe": recipe, "allocation": allocation, "layers": layers}
    finer: dict[str, Any] = {"tied": tied, "multiple": multiple, "temperature": temperature}
    finer |= {"head_multiple": head_multiple, "block_kinds": block_kinds}
    finer["remove_layers"] = remove_layers
    told = {"budget": budget, "refit": refit, "heal": heal} | how | finer
    _refuse_impossible(pipe, prompts, component, config, plan, told, saving)
    to = (results, pictures if results else 0, told, component)
    journal = Journal(pipe, list(prompts), config, *to, saving=saving or Saving())
    progress = journal.begin(progress)
    once: dict[str, Any] = {"checkpoint": checkpoint, "progress": progress}
    with journal.timed("calibrate"):
        statistics = calibrate(pipe, prompts, config, component=component, **once)
    curves: dict[str, ErrorCurve] = {}
    if budget is None:
        plan = _given(denoiser, statistics, plan, saving)
    else:
        finer |= {"saving": saving, "folder": checkpoint, "progress": progress}
        curves, plan = _allocated(journal, statistics, budget, how, finer)
    _finish(journal, statistics, plan, curves, progress, checkpoint)
    return plan


def _allocated(
    journal: Journal,
    statistics: Statistics,
    budget: Budget,
    how: dict[str, Any],
    finer: dict[str, Any],
) -> tuple[dict[str, ErrorCurve], Plan]:
    denoiser = component_of(journal.pipe, journal.component)[1]
    kept = {name: finer[name] for name in ("folder", "progress")}
    with journal.timed("allocate"):
        curves = measure_curves(denoiser, statistics, **how, **kept)
        plan = allocate(denoiser, statistics, budget, **how, **finer, curves=curves)
    return curves, plan


def _given(
    denoiser: nn.Module, statistics: Statistics, plan: Plan | None, saving: Saving | None
) -> Plan:
    assert plan is not None, "checked before: either a budget or a plan"
    groups = groups_of(denoiser)
    probe = statistics.probes.batches(1)[0]
    counted = costs_.measure(denoiser, groups, probe, plan.fused, saving)
    return by_hand(plan, groups, counted)


def _finish(
    journal: Journal,
    statistics: Statistics,
    plan: Plan,
    curves: Mapping[str, ErrorCurve],
    progress: Progress | None,
    folder: str | Path | None,
) -> None:
    """Rewrite the denoiser, add what was measured to the plan's figures, write the results."""
    name, denoiser = component_of(journal.pipe, journal.component)
    may = may_refit(journal.settings["refit"], plan.recipe, name, len(journal.prompts))
    dense = copy.deepcopy(denoiser) if may or journal.settings["heal"] else None
    held_out, earlier = HeldOut(denoiser, statistics), earlier_record(denoiser)
    journal.account(statistics, plan, curves)
    with journal.timed("rewrite"):
        rewrite(denoiser, statistics, plan, curves=curves, progress=progress)
        journal.round()
    setattr(journal.pipe, name, denoiser)  # the pipeline notes the class that it will be saved as
    if name in ENCODERS:
        plan.figures["component"] = name
    plan.figures.update(held_out.figures())
    if dense is not None and may:
        refit_slimmed(journal, dense, plan, held_out, progress)
    if dense is not None and journal.settings["heal"]:
        heal_slimmed(journal, dense, plan, held_out, folder, progress)
    _warn_beyond(journal.settings["budget"], plan)
    plan.figures["seconds"] = journal.seconds
    plan.figures["reused"] = journal.reused
    plan.figures["calibration"] = statistics.source
    if earlier is not None:
        known = ("params", "macs", "predicted_error", "error_on_probes", "started_from")
        begun = {key: earlier.plan.figures[key] for key in known if key in earlier.plan.figures}
        plan.figures["started_from"] = begun
    record: Any = denoiser.slim_record
    whole = plan if earlier is None else composed_plan(earlier.plan, plan)
    denoiser.slim_record = replace(record, plan=whole)
    journal.draw("slim")
    journal.write(plan)


def _warn_beyond(budget: Budget | None, plan: Plan) -> None:
    """Say so where a plan, as it is saved, loses more than its budget allows."""
    allowed = None if budget is None else budget.largest_error
    found = plan.figures.get("healed", plan.figures)["error_on_probes"]
    if allowed is not None and found > BEYOND * allowed:
        logger.warning(
            "warning: the slim model loses %.1e, more than the %.1e of the budget, with weights as "
            "they are saved: their rounding may lose the rest; save in more bits, or allow more",
            *(found, allowed),
        )


def _refuse_impossible(
    pipe: Any,
    prompts: Sequence[str],
    component: str | None,
    config: CalibrationConfig,
    plan: Plan | None,
    how: dict[str, Any],
    saving: Saving | None,
) -> None:
    """Raise for what cannot work before minutes are spent on calibration."""
    name, denoiser = component_of(pipe, component)
    budget: Budget | None = how["budget"]
    refuse_replaced(denoiser)
    check_heal(how["heal"], prompts, name)
    check_refit(how["refit"], name, len(prompts))
    if earlier_record(denoiser) is not None:
        logger.warning("warning: the model is slim already: shares are of what it has by now")
    if (budget is None) == (plan is None):
        raise SlimdiffError("give either a budget or a plan")
    recipe = recipe_named(how["recipe"])
    groups = groups_of(denoiser, how["layers"] or recipe.layers)
    if plan is not None:
        plan.check(groups_of(denoiser))
        check_removed(denoiser, groups_of(denoiser), plan)
    if budget is not None:
        if name in ENCODERS and budget.metric == "latency":
            raise SlimdiffError(
                f"{budget.describe()}: only denoisers are timed; give {name} a budget of "
                f"parameters, memory, MACs or quality"
            )
        allocation = how["allocation"] or recipe.allocation
        may_go = removable_layers(denoiser, groups) if how["remove_layers"] else frozenset()
        widths = (how["tied"], how["multiple"], how["temperature"], may_go)
        few = {name: how[name] for name in ("head_multiple", "block_kinds")}
        settings = Allocation(allocation, *widths, **few)
        call = one_row_of(first_call(pipe, component=component, **config.sampling))
        fused = fused_for(denoiser, groups, budget.metric)
        costs = costs_.measure(denoiser, groups, call, fused, saving)
        refuse_unfit(budget, recipe, settings, groups)
        if budget.metric != "latency" and budget.largest_error is None:
            check_budget(groups, costs, budget, recipe, settings)
