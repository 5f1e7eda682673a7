"""Removal: layers that go wholly, and put out nothing but their mean.

Width 0 of a plan's entry. The error is E|y - E y|^2, and E y comes from the statistics.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimdiff.denoiser import settings
from slimdiff.errors import SlimdiffError
from slimdiff.groups import OUTPUTS, Group, stem
from slimdiff.layers import layer_at
from slimdiff.plan import Plan
from slimdiff.statistics import Statistics

logger = logging.getLogger(__name__)


def why_it_stays(
    denoiser: nn.Module, group: Group, statistics: Statistics | None = None
) -> str | None:
    """Why the mean cannot stand in for what the layer of a group puts out; None if it can.

    Args:
        denoiser: dense.
        group: of it; one of `OUTPUTS`, since queries and keys go with their values.
        statistics: its mean must have been recorded in these.
    """
    from slimdiff.slim_denoiser import may_be_constant

    if group.kind not in OUTPUTS:
        return f"a {group.kind.replace('_', '-')} group puts out nothing that a mean could replace"
    if group.columns:
        return f"its last linear, {group.paths[OUTPUTS[group.kind]]}, is shared with another layer"
    if any(role != stem(role) for role in group.paths):
        return "it joins two streams, and puts out a tensor for each"
    layer = denoiser.get_submodule(group.layer)
    if not may_be_constant(layer):
        return f"a {type(layer).__name__} like this cannot put out a constant"
    if layer_at(denoiser, group.paths[OUTPUTS[group.kind]]).bias is None:
        return f"{group.paths[OUTPUTS[group.kind]]} has no bias, whose place its mean would take"
    if statistics is not None and mean_name(group) not in statistics.sums:
        return f"{mean_name(group)}, its mean, was not recorded; calibrate again"
    return None


def removable_layers(
    denoiser: nn.Module, groups: Sequence[Group], statistics: Statistics | None = None
) -> frozenset[str]:
    """Paths of the layers that can put out their mean (see `why_it_stays`)."""
    return frozenset(
        group.layer for group in groups if why_it_stays(denoiser, group, statistics) is None
    )


def check_removed(
    denoiser: nn.Module, groups: Sequence[Group], plan: Plan, statistics: Statistics | None = None
) -> None:
    """Refuse a plan that removes a layer which cannot go, or whose mean was not recorded.

    Raises:
        SlimdiffError: names the layer and says why.
    """
    for group in plan.removed(groups):
        if group.kind == "query_key":
            continue
        _refuse_if_it_stays(denoiser, group)
        if statistics is not None:
            constant_of(denoiser, group, statistics)


def _refuse_if_it_stays(
    denoiser: nn.Module, group: Group, statistics: Statistics | None = None
) -> None:
    why = why_it_stays(denoiser, group, statistics)
    if why is not None:
        raise SlimdiffError(
            f"{group.name}: the plan removes its layer (width 0), but {why}; give it a width"
        )


def removed_from(denoiser: nn.Module) -> dict[str, int]:
    """Paths of the layers that a slim denoiser lacks, with the channels that they put out."""
    slim = settings(denoiser).get("slimdiff") or {}
    return dict(slim.get("constants", {}))


def mean_name(group: Group) -> str:
    """What the statistics call the mean of a layer's output."""
    return f"{group.layer}/output_mean"


def constant_of(denoiser: nn.Module, group: Group, statistics: Statistics) -> Tensor:
    """What the layer of a group puts out in the mean, (o,).

    Raises:
        SlimdiffError: it was not recorded, or of another model; or the layer cannot be removed.
    """
    _refuse_if_it_stays(denoiser, group, statistics)
    outputs = layer_at(denoiser, group.paths[OUTPUTS[group.kind]]).weight.shape[0]
    statistics.check(mean_name(group), (outputs,))
    return statistics.mean(mean_name(group))


def remove_layers_(denoiser: nn.Module, gone: Sequence[Group], statistics: Statistics) -> None:
    """Have the layers of these groups put out their mean, and forget their weights, in place.

    Raises:
        SlimdiffError: as for `constant_of`.
    """
    from slimdiff.slim_denoiser import become_constant_

    for group in gone:
        if group.kind in OUTPUTS:
            constant = constant_of(denoiser, group, statistics)
            become_constant_(denoiser.get_submodule(group.layer), constant, group.layer)


def constant_weights(
    denoiser: nn.Module, group: Group, statistics: Statistics
) -> dict[str, Tensor]:
    """Parameters of dense size that make the group's layer put out its mean, by name.

    Queries and keys do not matter then: none for them.
    """
    if group.kind not in OUTPUTS:
        return {}
    path = group.paths[OUTPUTS[group.kind]]
    weight = layer_at(denoiser, path).weight
    constant = constant_of(denoiser, group, statistics).to(weight.device, weight.dtype)
    return {f"{path}.weight": torch.zeros_like(weight), f"{path}.bias": constant}


def tell_of_self_attention(denoiser: nn.Module) -> None:
    """Say which self-attention layers are gone, since guidance may want to perturb them."""
    layers = denoiser.named_modules()
    gone = [path for path, layer in layers if getattr(layer, "was_self_attention", False)]
    if gone:
        logger.warning(
            "warning: %d self-attention layers were removed (%s): guidance that perturbs or skips "
            "self-attention (PAG) has nothing to act on there; the model card lists them",
            *(len(gone), ", ".join(gone[:4]) + ", ..." * (len(gone) > 4)),
        )
