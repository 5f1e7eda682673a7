"""Recipes bound to groups: which decomposition a group gets, from its weights and statistics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slimdiff import decompose
from slimdiff.config import Recipe
from slimdiff.decompose import Decomposition, HeadSelection
from slimdiff.groups import FACTORED, Group
from slimdiff.importances import head_magnitudes
from slimdiff.layers import factor_of, layer_at, weight_of
from slimdiff.plan import Entry
from slimdiff.statistics import Statistics


class Ordered(NamedTuple):
    """Units or channels (f,), most useful first, and the error at every width (f + 1,)."""

    order_f: Tensor
    errors: Tensor


FLOAT32_DAMPING = 1e-5
"""Least ridge where sums are float32: their rounding reaches 2e-6 of the mean diagonal and more
in wide layers, and a ridge below it leaves a moment of few tokens indefinite."""

KEY_MOMENTS = {"centred": "k_centred", "whitened": "k"}
VALUE_MOMENTS = {"refit": "z", "attended": "z", "whitened": "v"}


def decompose_group(
    denoiser: nn.Module,
    group: Group,
    statistics: Statistics,
    recipe: Recipe,
    ordered: Ordered | None = None,
) -> Decomposition | HeadSelection:
    """The decomposition of one group under a recipe.

    Args:
        denoiser: holds the group's weights; read only.
        group: what to decompose.
        statistics: of this denoiser.
        recipe: how.
        ordered: what an earlier decomposition of a feed-forward group found, to spare its search.

    Raises:
        SlimdiffError: the statistics lack the group or belong to another model.
    """
    check_statistics(group, statistics, recipe)
    return DECOMPOSERS[group.kind](denoiser, group, statistics, recipe, ordered)


def maps_of(
    denoiser: nn.Module,
    group: Group,
    statistics: Statistics,
    recipe: Recipe,
    entry: Entry,
    *,
    ordered: Ordered | None = None,
    kept: Tensor | None = None,
) -> dict[str, Tensor]:
    """The maps of one group under an entry of a plan.

    Args:
        denoiser, group, statistics, recipe, ordered: as for `decompose_group`.
        entry: the group's; of a layer that stays.
        kept: the heads that stay, ascending, where some go from a layer that is also narrowed.

    Raises:
        SlimdiffError: as for `decompose_group`.
    """
    found = decompose_group(denoiser, group, statistics, recipe, ordered)
    if isinstance(found, HeadSelection):
        return found.maps(entry.heads)
    if kept is None:
        return found.maps(entry.width)
    return decompose.maps_of_heads(found, kept.to(found.errors.device), entry.width)


def _query_key(
    denoiser: nn.Module, group: Group, statistics: Statistics, recipe: Recipe, _: Ordered | None
) -> Decomposition | HeadSelection:
    if recipe.heads:
        return _whole_heads(group, statistics)
    return decompose.query_key(
        statistics.mean(f"{group.layer}/q"),
        statistics.mean(f"{group.layer}/{KEY_MOMENTS[recipe.keys]}"),
    )


def _value_output(
    denoiser: nn.Module, group: Group, statistics: Statistics, recipe: Recipe, _: Ordered | None
) -> Decomposition | HeadSelection:
    if recipe.heads:
        return _whole_heads(group, statistics)
    weight, moment, damping = output_moment(denoiser, group, statistics, recipe)
    refit = recipe.values == "refit"
    return decompose.value_output(weight, moment, group.heads, refit=refit, damping=damping)


def output_moment(
    denoiser: nn.Module, group: Group, statistics: Statistics, recipe: Recipe
) -> tuple[Tensor, Tensor, float]:
    """Weight (o, i) of a value-output group, the moment that it is refit under, and the ridge."""
    moment = statistics.mean(f"{group.layer}/{VALUE_MOMENTS[recipe.values]}")
    refit = recipe.values == "refit"
    damping = _damping(statistics, f"{group.layer}/z", moment) if refit else decompose.DAMPING
    # Both streams of joint attention read the same values: one basis serves both outputs.
    outputs = [weight_of(denoiser, group, role) for role in group.streams("out")]
    return torch.cat(outputs).double(), moment, damping


def _feed_forward(
    denoiser: nn.Module, group: Group, statistics: Statistics, recipe: Recipe, known: Ordered | None
) -> Decomposition | HeadSelection:
    moment = statistics.mean(f"{group.layer}/h")
    damping = _damping(statistics, f"{group.layer}/h", moment)
    # A factor on the linear part of a gated unit passes into the down projection's columns.
    homogeneous = recipe.units == "elimination" and (group.gated or "gate" in group.paths)
    if known is not None:
        return decompose.FeedForward(
            errors=known.errors.to(moment.device),
            missing=0,
            order_f=known.order_f,
            moment_ff=moment,
            refit=recipe.refit,
            damping=damping,
            homogeneous=homogeneous,
        )
    return decompose.feed_forward(
        weight_of(denoiser, group, "down").flatten(1).double(),
        moment,
        order=recipe.units,
        refit=recipe.refit,
        magnitude_f=statistics.mean(f"{group.layer}/h_magnitude"),
        damping=damping,
        homogeneous=homogeneous,
    )


def _resnet(
    denoiser: nn.Module, group: Group, statistics: Statistics, recipe: Recipe, known: Ordered | None
) -> Decomposition | HeadSelection:
    conv2, lags = layer_at(denoiser, group.paths["conv2"]), f"{group.layer}/lags"
    weight, moment = conv2.weight.detach(), statistics.mean(lags)
    if known is not None:
        order, errors = known.order_f, known.errors.to(moment.device)
        return decompose.ResNetChannels(
            errors, 0, order, moment, weight, recipe.refit, decompose.LAG_DAMPING
        )
    return decompose.resnet_channels(
        weight, moment, group.width // group.step, order=recipe.units, refit=recipe.refit
    )


def _modulation(
    denoiser: nn.Module, group: Group, statistics: Statistics, recipe: Recipe, _: Ordered | None
) -> Decomposition | HeadSelection:
    moment = statistics.mean(f"{group.source or group.layer}/x")
    return _low_rank(decompose.modulation, denoiser, group, moment)


def _projection(
    denoiser: nn.Module, group: Group, statistics: Statistics, recipe: Recipe, _: Ordered | None
) -> Decomposition | HeadSelection:
    name = f"{group.layer}/y"
    moment = statistics.mean(name)
    prior = len(moment) / (len(moment) + statistics.weights[name])
    decomposed = functools.partial(decompose.projection, prior=prior)
    return _low_rank(decomposed, denoiser, group, moment)


def _low_rank(
    decomposed: Callable[[Tensor, Tensor], decompose.LowRank],
    denoiser: nn.Module,
    group: Group,
    moment: Tensor,
) -> Decomposition:
    weight = weight_of(denoiser, group, "linear").flatten(1)
    if (projection := factor_of(denoiser, group)) is None:
        return decomposed(weight, moment)
    # A product of rank r has nothing to lose beyond it.
    found = decomposed(weight.double() @ projection.double().flatten(1), moment)
    errors = found.errors[: group.width + 1].clone()
    errors[-1] = 0.0
    return replace(found, errors=errors)


def check_statistics(group: Group, statistics: Statistics, recipe: Recipe) -> None:
    """Refuse statistics that lack what the recipe needs for this group.

    Raises:
        SlimdiffError: a sum is missing or has another shape than the denoiser's group.
    """
    inner, per_head = group.heads * group.width, (group.heads, group.width, group.width)
    needed: dict[str, tuple[int, ...]]
    if group.kind in FACTORED:
        # The moment is of the input or output, which no width of the group says.
        return
    if group.kind == "resnet":
        needed = {"lags": (len(decompose.LAGS), inner, inner)}
    elif group.kind == "feed_forward":
        needed = {"h": (inner, inner), "h_magnitude": (inner,)}
    elif recipe.heads:
        needed = {"z_magnitude": (inner,)}
    elif group.kind == "query_key":
        needed = {"q": per_head, KEY_MOMENTS[recipe.keys]: per_head}
    else:
        what = VALUE_MOMENTS[recipe.values]
        needed = {what: (inner, inner) if what == "z" else per_head}
    for what, shape in needed.items():
        statistics.check(f"{group.layer}/{what}", shape)


DECOMPOSERS: dict[str, Callable[..., Decomposition | HeadSelection]] = {
    "query_key": _query_key,
    "value_output": _value_output,
    "feed_forward": _feed_forward,
    "resnet": _resnet,
    "modulation": _modulation,
    "projection": _projection,
}


def _whole_heads(group: Group, statistics: Statistics) -> HeadSelection:
    return decompose.whole_heads(head_magnitudes(group, statistics))


def _damping(statistics: Statistics, name: str, moment_nn: Tensor) -> float:
    """The ridge of refits under a moment, by the precision of its sums."""
    if statistics.sums[name].dtype == torch.float64:
        return decompose.DAMPING
    return decompose.definite_damping(moment_nn, FLOAT32_DAMPING)
