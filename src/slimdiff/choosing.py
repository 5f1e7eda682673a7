"""Choosing: which kinds of layers shrink or go under a budget, judged by what is measured.

A first plan is made from gains that were measured one group at a time. Gains are then scaled to
what groups lose together, and the plan is made again, until both agree. Last, each thing that the
plan does (removes layers, removes heads, narrows one kind of layer) is left out once: where the
plan without it is measured to lose less, it stays out. Where like blocks are to share widths, they
are sorted by that plan, and it is made once more.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from slimdiff.block_kinds import alike
from slimdiff.errors import SlimdiffError
from slimdiff.groups import LAYERS
from slimdiff.jobs import Job
from slimdiff.joint import scaled
from slimdiff.plan import Plan

ROUNDS = 4

logger = logging.getLogger(__name__)

Fit = Callable[[Job], Plan]
Progress = Callable[[str, int, int], None]


def best_of(job: Job, fit: Fit, *, remove: bool = True, progress: Progress | None = None) -> Plan:
    """The best plan under a budget, as measured on the probes.

    Args:
        job: what plans are made from.
        fit: makes a plan that meets the budget.
        remove: whether layers and heads may go.
        progress: called with ("choose", plans measured, about how many in all).
    """
    if job.settings.name != "probed":
        return fit(job)
    search = _Search(fit, progress)
    score, plan, job = search.agreed(job.removing() if remove else job)
    for name, leave_out in _left_out(job, plan).items():
        without = leave_out(job)
        try:
            other = fit(without)
        except SlimdiffError:  # the budget is out of reach without it
            continue
        own = search.score(without, other)
        logger.info("without %s: %.3e, so far %.3e", name, own, score)
        if own < score:
            score, plan, job = own, other, without
    if job.settings.block_kinds is not None:
        sharing = alike(job.denoiser, job.groups, plan, job.settings.block_kinds)
        with_few, plan, job = search.agreed(job.allowing(alike=sharing))
        logger.info("few kinds of blocks: %.3e, each of its own: %.3e", with_few, score)
    return plan


class _Search:
    """Makes and measures plans."""

    def __init__(self, fit: Fit, progress: Progress | None) -> None:
        self.fit, self.progress, self.done = fit, progress, 0

    def agreed(self, job: Job) -> tuple[float, Plan, Job]:
        """The best of the plans on the way to one that loses what is predicted.

        With its score, and the job whose curves agree with it.
        """
        found: list[tuple[float, Plan, Job]] = []
        for _ in range(ROUNDS):
            try:
                plan = self.fit(job)
            except SlimdiffError:
                if not found:
                    raise
                break  # out of reach by what the curves say now
            curves, error, agreed = scaled(job.shared.choosing, job.shared.swaps, plan, job.curves)
            logger.info("predicted %.2e, measured %.2e", plan.figures["predicted_error"], error)
            plan.figures["predicted_error"] = error
            job = job.predicting(curves)
            found.append((self.score(job, plan), plan, job))
            if agreed:
                break
        return min(found, key=lambda own: own[0])

    def score(self, job: Job, plan: Plan) -> float:
        """What the best plan has least of: error, or under a budget of quality, MACs."""
        self.done += 1
        if self.progress is not None:
            self.progress("choose", self.done, max(self.done, ROUNDS + 4))
        if job.budget.largest_error is not None:
            return float(plan.figures["macs"])
        return job.loses(plan)


def _left_out(job: Job, plan: Plan) -> dict[str, Callable[[Job], Job]]:
    """For each thing that a plan does, by name: the same job without it."""
    ways: dict[str, Callable[[Job], Job]] = {}
    if plan.figures.get("heads_removed"):
        ways["fewer heads"] = lambda job: job.allowing(heads=False)
    if plan.figures.get("layers_removed"):
        ways["removal"] = lambda job: job.allowing(removable=frozenset())
    for layers in sorted({LAYERS[group.kind] for group in plan.changed(job.groups)}):
        ways[layers] = functools.partial(Job.keeping, layers=layers)
    return ways
