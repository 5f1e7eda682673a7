"""Jobs: what all plans under one budget have in common, and how they are fitted to it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slimdiff import costs as costs_
from slimdiff.budget import Budget, Saving
from slimdiff.bundles import Allocation
from slimdiff.config import Recipe
from slimdiff.curves import ErrorCurve, probes_of
from slimdiff.denoiser import dense_class
from slimdiff.errors import SlimdiffError
from slimdiff.families import groups_of
from slimdiff.fitting import fit_error, fit_speedup, timed
from slimdiff.groups import Group
from slimdiff.plan import Plan
from slimdiff.planning import make_plan
from slimdiff.prices import least_nanoseconds
from slimdiff.probing import Probed
from slimdiff.profiling import profile
from slimdiff.statistics import Statistics
from slimdiff.swapping import Swaps
from slimdiff.upsamplers import fused_for

Progress = Callable[[str, int, int], None]


class Measuring:
    """The probes, and the weights of plans, that all jobs of one call of `allocate` share."""

    def __init__(
        self,
        denoiser: nn.Module,
        statistics: Statistics,
        groups: Sequence[Group],
        curves: Mapping[str, ErrorCurve],
    ) -> None:
        self._of = denoiser, statistics
        self.swaps = Swaps(denoiser, groups, statistics, curves)

    @functools.cached_property
    def choosing(self) -> Probed:
        """The probes to choose by."""
        return probes_of(*self._of, held_out=False)

    @functools.cached_property
    def judging(self) -> Probed:
        """The probes to judge by."""
        return probes_of(*self._of)

    def weights(self, plan: Plan) -> dict[str, Tensor]:
        """Dense-size parameters that behave as those of a plan."""
        return self.swaps.joined(self.swaps.of(plan).values())


class Job:
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
        saving: Saving | None = None,
    ) -> None:
        probe = statistics.probes.batches(1)
        inputs = probe[0] if probe else costs_.example_inputs(denoiser)
        self.denoiser, self.statistics, self.curves = denoiser, statistics, curves
        self.groups = groups_of(denoiser, layers or recipe.layers)
        self.budget, self.recipe, self.settings = budget, recipe, settings
        self.shared = Measuring(denoiser, statistics, self.groups, curves)
        self._inputs, self._saving = inputs, saving
        self._fuse(fused_for(denoiser, self.groups, budget.metric))

    def _fuse(self, upsamplers: Sequence[str]) -> None:
        self.fused = upsamplers
        how = (self._inputs, upsamplers, self._saving)
        self.costs = costs_.measure(self.denoiser, self.groups, *how)

    def fusing(self, upsamplers: Sequence[str]) -> Job:
        """The same, with other upsamplers fused."""
        job = copy.copy(self)
        job._fuse(upsamplers)
        return job

    def removing(self) -> Job:
        """The same, where heads and the layers whose removal was measured may go."""
        measured = {name for name, curve in self.curves.items() if curve.removed is not None}
        removable = frozenset(g.layer for g in self.groups if g.name in measured)
        return self.allowing(removable=removable, heads=True)

    def allowing(self, **settings: Any) -> Job:
        """The same, with other settings."""
        job = copy.copy(self)
        job.settings = replace(self.settings, **settings)
        return job

    def keeping(self, layers: str) -> Job:
        """The same, where layers of this name stay as they are."""
        return self.allowing(kept=self.settings.kept | {layers})

    def predicting(self, curves: Mapping[str, ErrorCurve]) -> Job:
        """The same, by other curves."""
        job = copy.copy(self)
        job.curves = curves
        return job

    def lost(self, plan: Plan, *, guided: bool = False) -> float:
        """Error of a plan on the probes to judge by, all groups shrunk together.

        Args:
            plan: under the budget.
            guided: of the guided prediction, as predicted errors are, else of each half by itself.
        """
        return self.shared.judging.measure(self.shared.weights(plan), guided=guided).error

    def loses(self, plan: Plan) -> float:
        """Error of a plan on all probes, to compare it with other plans."""
        weights = self.shared.weights(plan)
        return self.shared.judging.error(weights) + self.shared.choosing.error(weights)

    def plan(self, **limits: Any) -> Plan:
        """The plan under the budget, or under other limits (see `make_plan`)."""
        return make_plan(
            dense_class(self.denoiser),
            self.groups,
            self.costs,
            self.curves,
            self.statistics,
            self.budget,
            self.recipe,
            self.settings,
            fused=self.fused,
            **limits,
        )


def as_fast(
    job: Job, rows: int, folder: str | Path | None, progress: Progress | None
) -> tuple[Job, Callable[[Job], Plan]]:
    """The job, fusing what is faster so, and its fit to a time; layers are timed here, once.

    Raises:
        SlimdiffError: there are no probes to time.
    """
    device = next(job.denoiser.parameters()).device
    call = next(iter(job.statistics.probes.batches(rows, device)), None)
    if call is None:
        raise SlimdiffError("the statistics hold no probes to time; record with num_probes")
    how: dict[str, Any] = {"multiple": job.settings.multiple, "folder": folder}
    times = profile(job.denoiser, job.groups, call, **how, progress=progress)
    dense = times.dense_nanoseconds

    def fit(job: Job) -> Plan:
        return fit_speedup(
            lambda limit: job.plan(profile=times, limit=limit),
            lambda plan: timed(job.denoiser, job.groups, plan, call),
            dense,
            least_nanoseconds(job.groups, job.recipe, job.settings, job.curves, times),
            dense / job.budget.limit(dense),
        )

    return job.fusing(tuple(times.fused)), fit


def as_good(job: Job) -> Plan:
    """The fit to an error: the fewest MACs whose plan loses no more than that."""
    assert job.budget.largest_error is not None
    goal = job.budget.largest_error
    return fit_error(lambda goal: job.plan(largest_error=goal), job.lost, goal)
