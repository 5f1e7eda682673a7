"""Rounds: a budget reached in several steps, each on statistics of what the last one left.

Error curves say what a group loses where all others are dense. Halfway down that is no longer so:
there the slim pipeline is calibrated again, and what is still to go is allocated anew. Whether that
was worth it is measured against the same budget reached in one step.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slimdiff.budget import Budget
from slimdiff.calibrate import calibrate, slim_digest
from slimdiff.composition import composed_plan
from slimdiff.config import recipe_named
from slimdiff.curves import ErrorCurve
from slimdiff.denoiser import component_of
from slimdiff.errors import SlimdiffError
from slimdiff.families import groups_of
from slimdiff.fitting import measured_error
from slimdiff.journal import Journal
from slimdiff.plan import Plan
from slimdiff.probing import Probed
from slimdiff.rewrite import rewrite
from slimdiff.statistics import Statistics
from slimdiff.statistics_file import WEIGHTS_FILE, read_header
from slimdiff.widths import allocate, measure_curves

Progress = Callable[[str, int, int], None]

logger = logging.getLogger(__name__)


def check_rounds(rounds: int, budget: Budget | None, recipe: str) -> None:
    """Refuse what cannot be done in rounds.

    Raises:
        SlimdiffError: fewer than one; or more than one where it is not known beforehand how much
            goes (a plan, a quality), or where a recipe has no error to compare.
    """
    if rounds < 1:
        raise SlimdiffError(f"rounds is {rounds}, expected at least 1; 2 calibrates again halfway")
    if rounds == 1:
        return
    why = None
    if budget is None:
        why = "a plan has all widths already; give a budget"
    elif budget.largest_error is not None:
        why = f"{budget.describe()} does not say how much is to go; give another budget"
    elif recipe_named(recipe).heads:
        why = f"recipe {recipe} has no error curves to go by; choose another recipe"
    if why is not None:
        raise SlimdiffError(f"rounds is {rounds}, but {why}, or leave rounds at 1")


@dataclass(frozen=True)
class Rounds:
    """What the rounds of one compression have in common.

    Attributes:
        journal: knows the pipeline, its prompts and how it is sampled.
        budget: what the component may hold in the end.
        count: how many rounds; in each an equal part of what is to go goes.
        how: recipe, allocation and layers, as `measure_curves` takes them.
        finer: what `allocate` takes besides.
        checkpoint: folder of the first round; later ones have folders in it.
        progress: called with (stage, done, in all); stages of later rounds say which.
    """

    journal: Journal
    budget: Budget
    count: int
    how: Mapping[str, Any]
    finer: Mapping[str, Any]
    checkpoint: str | Path | None = None
    progress: Progress | None = None

    def slim(
        self,
        statistics: Statistics,
        one_shot: Plan,
        curves: Mapping[str, ErrorCurve],
        probed: Probed,
    ) -> Plan:
        """Slim the component in rounds, in place, and return the plan of all of them.

        The error of the slim component is compared with that of `one_shot`, on the same probes.
        Where it is not lower, the component is slimmed under `one_shot` instead.

        Args:
            statistics: of the component as it is.
            one_shot: the plan that reaches the budget from there.
            curves: under these statistics.
            probed: the component as it is, on the probes of the statistics.
        """
        module = probed.denoiser
        alone = measured_error(probed, groups_of(module), statistics, one_shot, curves)
        kept, device = on_cpu(module), next(module.parameters()).device
        plan = self._round(1, statistics, curves, one_shot, None)
        statistics.sums = {name: total.cpu() for name, total in statistics.sums.items()}
        for number in range(2, self.count + 1):
            plan = self._round(number, *self._measured(number), one_shot, plan)
        if "latency" in one_shot.figures:
            plan.figures["latency"]["wanted"] = one_shot.figures["latency"]["wanted"]
        plan = replace(plan, budget=self.budget.describe())
        error = probed.error({})
        better = error < alone
        _tell(self.count, better, error, alone)
        if not better:
            put_back_(module, kept, device)
            statistics.sums = {name: total.to(device) for name, total in statistics.sums.items()}
            plan = one_shot
            self._rewrite(1, statistics, plan, curves)
        told = {"asked": self.count, "kept": better, "error_one_shot": alone, "error": error}
        plan.figures["rounds"] = told
        return plan

    def _measured(self, number: int) -> tuple[Statistics, dict[str, ErrorCurve]]:
        """Statistics and error curves of the component as it is by now."""
        journal, folder = self.journal, self._folder(number)
        kept: dict[str, Any] = {"progress": self._reporting(number)}
        with journal.timed("calibrate"):
            where: dict[str, Any] = {"component": journal.component, "checkpoint": folder}
            statistics = calibrate(journal.pipe, journal.prompts, journal.config, **where, **kept)
        with journal.timed("allocate"):
            module = self._component()
            return statistics, measure_curves(module, statistics, **self.how, folder=folder, **kept)

    def _round(
        self,
        number: int,
        statistics: Statistics,
        curves: Mapping[str, ErrorCurve],
        one_shot: Plan,
        plan: Plan | None,
    ) -> Plan:
        """Take one step, in place; returns the plan of this and of what came before (`plan`)."""
        budget = self._budget(number, one_shot, plan)
        given: dict[str, Any] = {**self.how, **self.finer, "curves": curves}
        given |= {"folder": self._folder(number), "progress": self._reporting(number)}
        with self.journal.timed("allocate"):
            step = allocate(self._component(), statistics, budget, **given)
        self._rewrite(number, statistics, step, curves)
        return step if plan is None else composed_plan(plan, step)

    def _rewrite(
        self,
        number: int,
        statistics: Statistics,
        plan: Plan,
        curves: Mapping[str, ErrorCurve],
    ) -> None:
        name, module = component_of(self.journal.pipe, self.journal.component)
        with self.journal.timed("rewrite"):
            more: dict[str, Any] = {"curves": curves, "progress": self._reporting(number)}
            rewrite(module, statistics, plan, **more)
        setattr(self.journal.pipe, name, module)

    def _budget(self, number: int, one_shot: Plan, plan: Plan | None) -> Budget:
        """What the component may hold after a round, or how much faster it is to become in it."""
        share = number / self.count
        if self.budget.metric == "latency":
            done = 1.0 if plan is None else float(plan.figures["latency"]["speedup"])
            wanted = float(one_shot.figures["latency"]["wanted"])
            return Budget(speedup=max(1.0, wanted**share / done))
        metric = self.budget.metric
        there = int(one_shot.figures[f"{metric}_dense"])
        bytes_each = next(self._component().parameters()).element_size()
        limit = min(there, self.budget.in_parameters(bytes_each).limit(there))
        count = there - int(share * (there - limit)) if number < self.count else limit
        return Budget(params=count) if metric == "params" else Budget(macs=count)

    def _component(self) -> nn.Module:
        return component_of(self.journal.pipe, self.journal.component)[1]

    def _reporting(self, number: int) -> Progress:
        """`progress` for the stages of one round."""

        def report(stage: str, done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(stage if number == 1 else f"{stage}, round {number}", done, total)

        return self.journal.noting(report)

    def _folder(self, number: int) -> Path | None:
        """Where a round keeps what it records; what another halfway model left there goes."""
        if self.checkpoint is None:
            return None
        if number == 1:
            return Path(self.checkpoint)
        folder = Path(self.checkpoint) / f"round-{number}"
        file = folder / WEIGHTS_FILE
        if file.is_file():
            found = read_header(file)["source"].get("widths_sha256")
            if found != slim_digest(self._component()):
                file.unlink()
        return folder


def _tell(count: int, better: bool, error: float, alone: float) -> None:
    if better:
        logger.info("%d rounds lose %.2e, one shot %.2e", count, error, alone)
        return
    logger.warning(
        "%d rounds lose %.2e on held-out probes, and one shot %.2e: the result is that of one shot",
        *(count, error, alone),
    )


def on_cpu(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the CPU."""
    copies: dict[int, Any] = {id(own): _copied(own) for own in module.buffers()}
    for own in module.parameters():
        copies[id(own)] = nn.Parameter(_copied(own), requires_grad=own.requires_grad)
    return copy.deepcopy(module, copies)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def put_back_(module: nn.Module, kept: nn.Module, device: Any) -> None:
    """Have `module`, in place, be what `kept` is, on `device`; `kept` is used up."""
    module.__class__ = kept.__class__
    vars(module).clear()
    vars(module).update(vars(kept))
    nn.Module.to(module, device)  # those of diffusers and transformers warn about some dtypes
