"""Removal: layers that go wholly, and put out nothing but their mean.

Width 0 of a plan's entry. The error is E|y - E y|^2, and E y comes from the statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimdiff.errors import SlimdiffError
from slimdiff.groups import OUTPUTS, Group, layer_at
from slimdiff.statistics import Statistics


def removable_layers(
    denoiser: nn.Module, groups: Sequence[Group], statistics: Statistics | None = None
) -> frozenset[str]:
    """Paths of the layers that can put out a constant.

    Those whose last linear or convolution has a bias, which the constant takes the place of, and,
    with `statistics`, whose mean was recorded.
    """
    from slimdiff.slim_denoiser import may_be_constant

    return frozenset(
        group.layer
        for group in groups
        if group.kind in OUTPUTS
        and may_be_constant(denoiser.get_submodule(group.layer))
        and layer_at(denoiser, group.paths[OUTPUTS[group.kind]]).bias is not None
        and (statistics is None or mean_name(group) in statistics.sums)
    )


def removed_from(denoiser: nn.Module) -> dict[str, int]:
    """Paths of the layers that a slim denoiser lacks, with the channels that they put out."""
    slim = dict(getattr(denoiser, "config", {})).get("slimdiff") or {}
    return dict(slim.get("constants", {}))


def mean_name(group: Group) -> str:
    """What the statistics call the mean of a layer's output."""
    return f"{group.layer}/output_mean"


def constant_of(denoiser: nn.Module, group: Group, statistics: Statistics) -> Tensor:
    """What the layer of a group puts out in the mean, (o,).

    Raises:
        SlimdiffError: it was not recorded, or of another model; or the layer cannot be removed.
    """
    if group.layer not in removable_layers(denoiser, [group]):
        raise SlimdiffError(
            f"{group.name}: the plan removes it (width 0), but a "
            f"{type(denoiser.get_submodule(group.layer)).__name__} like this cannot put out a "
            f"constant; give it a width"
        )
    if mean_name(group) not in statistics.sums:
        raise SlimdiffError(
            f"{mean_name(group)}: the mean was not recorded, so the layer cannot be removed (width "
            f"0); give it a width, or calibrate again"
        )
    outputs = layer_at(denoiser, group.paths[OUTPUTS[group.kind]]).weight.shape[0]
    statistics.check(mean_name(group), (outputs,))
    return statistics.mean(mean_name(group))


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
