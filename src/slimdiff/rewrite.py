"""Rewriting: puts smaller weights into the denoiser. The only stage that mutates a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from slimdiff.config import recipe_named
from slimdiff.curves import ErrorCurve
from slimdiff.errors import SlimdiffError
from slimdiff.families import groups_of
from slimdiff.groups import LAYERS, OUTPUTS, Group, layer_at
from slimdiff.plan import Entry, Plan, SlimRecord
from slimdiff.recipes import Ordered, check_statistics, decompose_group
from slimdiff.removal import constant_of
from slimdiff.shapes import slim_config
from slimdiff.statistics import Statistics

Progress = Callable[[str, int, int], None]
Weights = dict[str, tuple[Tensor, Tensor | None]]

logger = logging.getLogger(__name__)


def rewrite(
    denoiser: nn.Module,
    statistics: Statistics,
    plan: Plan,
    *,
    curves: Mapping[str, ErrorCurve] | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Rewrite `denoiser` in place to the plan's widths, and return it.

    Afterwards its class is the slim subclass of its class, its config tells the narrow shapes, and
    `denoiser.slim_record` holds the plan and the maps.

    Args:
        denoiser: of a known family, dense, any floating dtype; decomposed in float64.
        statistics: recorded from this denoiser.
        plan: checked against the denoiser before anything is touched.
        curves: from the allocation, to spare ordering hidden units again.
        progress: called with ("rewrite", groups done, groups in all).

    Raises:
        SlimdiffError: slim already; the plan or the statistics belong to another model.
    """
    from slimdiff.slim_denoiser import become_constant_, become_slim_

    refuse_slim(denoiser)
    groups = groups_of(denoiser)
    plan.check(groups)
    config = slim_config(denoiser, groups, plan.entries)
    maps: dict[str, Tensor] = {}
    gone, changed = plan.removed(groups), plan.changed(groups)
    constants = {g.layer: constant_of(denoiser, g, statistics) for g in gone if g.kind in OUTPUTS}
    changed = [group for group in changed if group not in gone]
    recipe = recipe_named(plan.recipe)
    for group in changed:
        check_statistics(group, statistics, recipe)
    for layer, constant in constants.items():
        become_constant_(denoiser.get_submodule(layer), constant, layer)
    for done, group in enumerate(changed, start=1):
        curve = (curves or {}).get(group.name)
        own = _maps(denoiser, group, statistics, plan, None if curve is None else curve.ordered)
        _put(denoiser, _slim_weights(denoiser, group, plan.entries[group.name], own))
        own.pop("weight", None)  # a ResNet's new kernel is no map: it is the weight itself
        maps |= {f"{group.name}/{name}": value.cpu() for name, value in own.items()}
        if progress is not None:
            progress("rewrite", done, len(changed))
    become_slim_(denoiser, config)
    denoiser.slim_record = SlimRecord(plan, maps)  # type: ignore[assignment]  # no tensor
    return denoiser


def refuse_slim(denoiser: nn.Module) -> None:
    """Refuse a denoiser that is slim already.

    Raises:
        SlimdiffError: it is.
    """
    if dict(getattr(denoiser, "config", {})).get("slimdiff"):
        raise SlimdiffError(
            f"{type(denoiser).__name__}: is slim already; start from the dense model, with the "
            f"smaller budget"
        )


def _maps(
    denoiser: nn.Module, group: Group, statistics: Statistics, plan: Plan, ordered: Ordered | None
) -> dict[str, Tensor]:
    entry = plan.entries[group.name]
    recipe = recipe_named(plan.recipe)
    decomposition = decompose_group(denoiser, group, statistics, recipe, ordered)
    by_heads = recipe.heads and LAYERS[group.kind] == "attention"
    size = entry.heads if by_heads else entry.width
    return decomposition.maps(size)


def _slim_weights(
    denoiser: nn.Module, group: Group, entry: Entry, maps: Mapping[str, Tensor]
) -> Weights:
    linears = {role: _parameters(denoiser, path) for role, path in group.paths.items()}
    if group.kind == "resnet":
        slim = _resnet(linears, group, maps)
    elif "heads" in maps:
        slim = {role: _kept_heads(role, *linears[role], maps["heads"], group) for role in linears}
    elif group.kind == "feed_forward":
        slim = _feed_forward(linears, group, maps)
    else:
        slim = {role: _mapped(role, *linears[role], maps[role]) for role in linears}
    if group.kind == "query_key" and entry.width != group.width:
        slim["q"] = _rescaled(denoiser, group, entry, *slim["q"])
    return {group.paths[role]: weights for role, weights in slim.items()}


def _mapped(
    role: str, weight_oi: Tensor, bias_o: Tensor | None, map_: Tensor
) -> tuple[Tensor, Tensor | None]:
    """W' = T^T W head by head for q, k and v; W' = W T for out, whose bias stays."""
    if role == "out":
        return weight_oi @ map_, bias_o
    heads = map_.shape[0]
    weight_hei = weight_oi.unflatten(0, (heads, -1))
    weight_ri = (map_.mT @ weight_hei).flatten(0, 1)
    if bias_o is None:
        return weight_ri, None
    return weight_ri, (map_.mT @ bias_o.unflatten(0, (heads, -1, 1))).flatten()


def _rescaled(
    denoiser: nn.Module, group: Group, entry: Entry, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Attention divides by the root of the present head width: fold the difference into q."""
    scale = getattr(denoiser.get_submodule(group.layer), "scale", group.width**-0.5)
    factor = float(scale) * entry.width**0.5
    return weight * factor, None if bias is None else bias * factor


def _kept_heads(
    role: str, weight_oi: Tensor, bias_o: Tensor | None, heads: Tensor, group: Group
) -> tuple[Tensor, Tensor | None]:
    if role == "out":
        return weight_oi.unflatten(1, (group.heads, -1))[:, heads].flatten(1), bias_o
    kept = weight_oi.unflatten(0, (group.heads, -1))[heads].flatten(0, 1)
    return kept, None if bias_o is None else bias_o.unflatten(0, (group.heads, -1))[heads].flatten()


def _feed_forward(linears: Weights, group: Group, maps: Mapping[str, Tensor]) -> Weights:
    """Kept rows of `up` (values and gates alike); W_down' = W_S + W_R coupling."""
    units, coupling = maps["units"], maps["coupling"]
    up, up_bias = linears["up"]
    down, down_bias = linears["down"]
    rows = torch.cat([units, units + group.width]) if group.gated else units
    removed = torch.ones(group.width, dtype=torch.bool, device=units.device)
    removed[units] = False
    return {
        "up": (up[rows], None if up_bias is None else up_bias[rows]),
        "down": (down[:, units] + down[:, removed] @ coupling, down_bias),
    }


def _resnet(layers: Weights, group: Group, maps: Mapping[str, Tensor]) -> Weights:
    """Kept channels of all that makes the inner map, and the second convolution's new kernel."""
    channels = maps["channels"]
    slim: Weights = {"conv2": (maps["weight"], layers["conv2"][1])}
    for role in (role for role in layers if role != "conv2"):
        weight, bias = layers[role]
        twice = role == "time" and group.gated
        rows = torch.cat([channels, channels + group.width]) if twice else channels
        slim[role] = weight[rows], None if bias is None else bias[rows]
    return slim


def _parameters(denoiser: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
    layer = layer_at(denoiser, path)
    bias = None if layer.bias is None else layer.bias.detach().double()
    return layer.weight.detach().double(), bias


def _put(denoiser: nn.Module, weights: Weights) -> None:
    for path, (weight, bias) in weights.items():
        layer = layer_at(denoiser, path)
        dense = layer.weight
        if isinstance(layer, nn.GroupNorm):
            layer.num_groups = layer.num_groups * len(weight) // layer.num_channels
            layer.num_channels = len(weight)
        elif isinstance(layer, nn.Conv2d):
            layer.out_channels, layer.in_channels = weight.shape[:2]
        else:
            layer.out_features, layer.in_features = weight.shape
        layer.weight = _parameter(weight, dense)
        if bias is not None:
            layer.bias = _parameter(bias, dense)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    value = value.to(device=like.device, dtype=like.dtype).contiguous()
    return nn.Parameter(value, requires_grad=like.requires_grad)
