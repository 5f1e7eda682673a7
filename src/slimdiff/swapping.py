"""Swapping: dense-size weights that behave as the slim ones of a plan, with nothing rewritten.

A group's weights are made once for each entry of a plan; plans that differ in a few groups share
those of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from slimdiff.config import Recipe, recipe_named
from slimdiff.curves import ErrorCurve, effective_weights
from slimdiff.groups import Group
from slimdiff.heads import kept_heads
from slimdiff.plan import Entry, Plan
from slimdiff.recipes import maps_of
from slimdiff.removal import constant_weights
from slimdiff.statistics import Statistics

Weights = dict[str, Tensor]


class Swaps:
    """Weights that stand for the groups of plans.

    Those of the plan that was asked for last are kept.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        groups: Sequence[Group],
        statistics: Statistics,
        curves: Mapping[str, ErrorCurve],
    ) -> None:
        self.denoiser, self.groups = denoiser, groups
        self.statistics, self.curves = statistics, curves
        self._kept: dict[str, tuple[tuple, Weights]] = {}

    def of(
        self, plan: Plan, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Weights]:
        """Group name -> parameters by name, for the groups that change under a plan.

        Args:
            plan: of this denoiser.
            progress: called with (groups done, groups in all).
        """
        heads = kept_heads(self.denoiser, self.groups, self.statistics, plan, self.curves)
        recipe, changed = recipe_named(plan.recipe), plan.changed(self.groups)
        made: dict[str, tuple[tuple, Weights]] = {}
        for done, group in enumerate(changed, start=1):
            entry, which = plan.entries[group.name], heads.get(group.layer)
            key = (recipe.name, entry, None if which is None else tuple(which.tolist()))
            kept = self._kept.get(group.name)
            if kept is None or kept[0] != key:
                kept = (key, self._make(group, entry, recipe, which))
            made[group.name] = kept
            if progress is not None:
                progress(done, len(changed))
        self._kept = made
        return {name: weights for name, (_, weights) in made.items()}

    def joined(self, parts: Iterable[Weights]) -> Weights:
        """The parameters of several groups together; groups may share a linear, by its columns."""
        found: Weights = {}
        for part in parts:
            for name, weight in part.items():
                if name in found:
                    dense = self.denoiser.get_parameter(name).detach()
                    weight = found[name] + (weight - dense)
                found[name] = weight
        return found

    def _make(self, group: Group, entry: Entry, recipe: Recipe, which: Tensor | None) -> Weights:
        if entry.width == 0:
            return constant_weights(self.denoiser, group, self.statistics)
        curve = self.curves.get(group.name)
        ordered = None if curve is None else curve.ordered
        maps = maps_of(
            *(self.denoiser, group, self.statistics, recipe, entry), ordered=ordered, kept=which
        )
        return effective_weights(self.denoiser, group, maps)
