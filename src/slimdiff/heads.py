"""Whole heads of attention layers: which go first, and what a layer loses without them.

Both halves of a layer lose the same heads. Which ones is a matter of its output: each time the one
goes whose absence costs least after the output projection was refitted to the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from slimdiff import decompose
from slimdiff.bundles import Allocation, sizes_of
from slimdiff.config import Recipe, recipe_named
from slimdiff.curves import ErrorCurve
from slimdiff.decompose import QueryKey
from slimdiff.errors import SlimdiffError
from slimdiff.groups import LAYERS, Group
from slimdiff.plan import Plan
from slimdiff.recipes import check_statistics, decompose_group, output_moment
from slimdiff.statistics import Statistics


def halves_of(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Query-key and value-output groups of the attention layers where heads may go."""
    layers: dict[str, dict[str, Group]] = {}
    for group in groups:
        if LAYERS[group.kind] == "attention":
            layers.setdefault(group.layer, {})[group.kind] = group
    pairs = [(own["query_key"], own["value_output"]) for own in layers.values() if len(own) == 2]
    return [(qk, vo) for qk, vo in pairs if vo.heads > 1 and not vo.fixed_heads]


def measure_heads(
    denoiser: nn.Module,
    groups: Sequence[Group],
    statistics: Statistics,
    recipe: Recipe,
    curves: Mapping[str, ErrorCurve],
    keep: Callable[[Mapping[str, ErrorCurve]], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, ErrorCurve]:
    """The curves, with errors by heads for the layers where heads may go.

    It takes weights and statistics, but no call of the denoiser. Layers that were looked at before
    are left alone; `keep` is called with all curves if there was any other, and `progress` with
    ("heads", layers done, layers in all) after each.
    """
    found = dict(curves)
    if recipe.heads or recipe.values != "refit":
        return found
    pairs = [(qk, vo) for qk, vo in halves_of(groups) if qk.width == vo.width]  # tied ones
    new = [(qk, vo) for qk, vo in pairs if found[vo.name].by_heads is None]
    for done, (qk, vo) in enumerate(new, start=1):
        found |= _by_heads(denoiser, qk, vo, statistics, recipe, found)
        if progress is not None:
            progress("heads", done, len(new))
    if new and keep is not None:
        keep(found)
    return found


def _by_heads(
    denoiser: nn.Module,
    qk: Group,
    vo: Group,
    statistics: Statistics,
    recipe: Recipe,
    curves: Mapping[str, ErrorCurve],
) -> dict[str, ErrorCurve]:
    """The curves of one layer's halves, with errors by heads.

    No more heads go than lose, at full width, what all heads lose at the least width.
    """
    query, value = curves[qk.name], curves[vo.name]
    weight, moment, damping = output_moment(denoiser, vo, statistics, recipe)
    least = sizes_of(vo, Allocation.multiple)[0]
    gain = value.gain_at(vo.width)
    largest = (query.at(least) + value.at(least)) / gain if gain > 0 else math.inf
    order, lost = decompose.head_order(weight, moment, vo.heads, damping=damping, largest=largest)
    queries: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    if len(lost) > 1:
        logits = decompose_group(denoiser, qk, statistics, recipe)
        assert isinstance(logits, QueryKey)
        errors = decompose.head_errors(logits, weight, moment, damping)
    for heads in range(vo.heads - 1, vo.heads - len(lost), -1):
        queries[heads], values[heads] = (found.cpu() for found in errors.of(order[:heads]))
    order = order.cpu()
    return {
        qk.name: replace(query, by_heads=queries, order=order),
        vo.name: replace(value, by_heads=values, order=order),
    }


def kept_heads(
    denoiser: nn.Module,
    groups: Sequence[Group],
    statistics: Statistics,
    plan: Plan,
    curves: Mapping[str, ErrorCurve] | None = None,
) -> dict[str, Tensor]:
    """Layer -> the heads that stay, ascending, of the layers that lose some under a plan.

    Recipes that only ever remove whole heads order them in another way: none for these.

    Args:
        denoiser: with the weights of these groups, dense.
        groups: of the plan; both halves of each layer.
        statistics: of this denoiser.
        plan: says how many heads stay.
        curves: from the allocation, to spare ordering heads again.

    Raises:
        SlimdiffError: heads go under a recipe that does not refit the output to those that stay.
    """
    recipe = recipe_named(plan.recipe)
    found: dict[str, Tensor] = {}
    for _, vo in [] if recipe.heads else halves_of(plan.narrowed(groups)):
        heads = plan.entries[vo.name].heads
        if heads == vo.heads:
            continue
        if recipe.values != "refit":
            raise SlimdiffError(
                f"{vo.name}: {heads} of {vo.heads} heads stay, but recipe {recipe.name} narrows "
                f"all of them alike; keep {vo.heads}, or choose the recipe slimdiff or magnitude"
            )
        curve = (curves or {}).get(vo.name)
        order = None if curve is None or heads not in (curve.by_heads or {}) else curve.order
        if order is None:
            check_statistics(vo, statistics, recipe)
            weight, moment, damping = output_moment(denoiser, vo, statistics, recipe)
            order = decompose.head_order(weight, moment, vo.heads, damping=damping).order_b
        found[vo.layer] = order[:heads].sort().values
    return found
