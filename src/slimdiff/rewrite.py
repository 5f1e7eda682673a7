"""Rewriting: puts smaller weights into the denoiser. The only stage that mutates a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from slimdiff.components import become_slim_
from slimdiff.composition import composed, earlier_record
from slimdiff.config import recipe_named
from slimdiff.curves import ErrorCurve
from slimdiff.denoiser import settings
from slimdiff.digest import refuse_other_model
from slimdiff.families import groups_of
from slimdiff.forwards import let_classes_speak_, refuse_hidden
from slimdiff.groups import FACTORED, Group, stem
from slimdiff.heads import kept_heads
from slimdiff.layers import Layer, factors_of, layer_at, weight_of
from slimdiff.plan import Entry, Plan, SlimRecord
from slimdiff.recipes import check_statistics, maps_of
from slimdiff.removal import check_removed, remove_layers_, tell_of_self_attention
from slimdiff.shapes import joined, slim_config
from slimdiff.statistics import Statistics
from slimdiff.wrapped import refuse_offloaded

Progress = Callable[[str, int, int], None]
Weights = dict[str, tuple[Tensor, Tensor | None]]


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
    `denoiser.slim_record` holds the plan and the maps. Those of a denoiser that was slim already
    are joined with its earlier ones, so that they begin at the dense denoiser.

    Args:
        denoiser: of a known family, dense or slim, any floating dtype; decomposed in float64.
        statistics: recorded from this denoiser.
        plan: checked against the denoiser before anything is touched.
        curves: from the allocation, to spare ordering hidden units again.
        progress: called with ("rewrite", groups done, groups in all).

    Raises:
        SlimdiffError: the plan or the statistics belong to another model; it is slim, and carries
            no plan and maps; something stands over it (a cache, FreeU, offloading), or over the
            forward of a layer that gets another.
    """
    refuse_offloaded(denoiser)
    earlier = earlier_record(denoiser)
    groups = groups_of(denoiser)
    plan.check(groups)
    check_removed(denoiser, groups, plan, statistics)
    for group in plan.narrowed(groups):
        check_statistics(group, statistics, recipe_named(plan.recipe))
    refuse_other_model(statistics.source, dict(denoiser.named_parameters()))
    config = slim_config(denoiser, groups, plan.entries, plan.fused)
    refuse_hidden(denoiser, config)
    config = joined(settings(denoiser).get("slimdiff"), config)
    maps = slim_groups_(denoiser, groups, statistics, plan, curves=curves, progress=progress)
    become_slim_(denoiser, config)
    let_classes_speak_(denoiser)
    tell_of_self_attention(denoiser)
    record = SlimRecord(plan, maps)
    record = record if earlier is None else composed(earlier, record)
    denoiser.slim_record = record  # type: ignore[assignment]  # no tensor
    return denoiser


def slim_groups_(
    denoiser: nn.Module,
    groups: Sequence[Group],
    statistics: Statistics,
    plan: Plan,
    *,
    curves: Mapping[str, ErrorCurve] | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Put the smaller weights of `groups` into `denoiser`, and return the maps; no other change.

    Maps are keyed `<group name>/<map name>`, on the CPU. Layers that go put out their mean.
    """
    maps: dict[str, Tensor] = {}
    recipe, kept = recipe_named(plan.recipe), kept_heads(denoiser, groups, statistics, plan, curves)
    remove_layers_(denoiser, plan.removed(groups), statistics)
    changed = sorted(plan.narrowed(groups), key=_first_column, reverse=True)
    for done, group in enumerate(changed, start=1):
        curve = (curves or {}).get(group.name)
        entry, ordered = plan.entries[group.name], None if curve is None else curve.ordered
        which = kept.get(group.layer)
        own = maps_of(denoiser, group, statistics, recipe, entry, ordered=ordered, kept=which)
        slim = slim_weights(denoiser, group, entry, own)
        put_(denoiser, group, slim)
        for name in ("weight", "projection"):  # new weights themselves, no maps
            own.pop(name, None)
        maps |= {f"{group.name}/{name}": value.cpu() for name, value in own.items()}
        if progress is not None:
            progress("rewrite", done, len(changed))
    return maps


def _first_column(group: Group) -> int:
    """Where a group's part of a shared linear begins: the last part shrinks first, so that those
    before it stay where they are."""
    return max((start for start, _ in group.columns.values()), default=0)


def slim_weights(
    denoiser: nn.Module, group: Group, entry: Entry, maps: Mapping[str, Tensor]
) -> Weights:
    """What a group's layers become under `maps`: weight and bias by role, in float64."""
    if group.kind in FACTORED:
        return {"linear": (maps["weight"], None), "projection": (maps["projection"], None)}
    linears = {role: _parameters(denoiser, group, role) for role in group.paths}
    if group.kind == "resnet":
        slim = _resnet(linears, group, maps)
    elif set(maps) == {"heads"}:
        slim = {role: _kept_heads(role, *linears[role], maps["heads"], group) for role in linears}
    elif group.kind == "feed_forward":
        slim = _feed_forward(linears, group, maps)
    else:
        kept = maps.get("heads", slice(None))
        slim = {role: _mapped(role, *linears[role], maps[stem(role)], kept) for role in linears}
    if group.kind == "query_key" and entry.width != group.width:
        for role in group.streams("q"):
            slim[role] = _rescaled(denoiser, group, entry, *slim[role])
    return slim


def _mapped(
    role: str, weight_oi: Tensor, bias_o: Tensor | None, map_: Tensor, kept: Tensor | slice
) -> tuple[Tensor, Tensor | None]:
    """W' = T^T W by head for q, k and v, of the kept heads; W' = W T for out, whose bias stays."""
    if stem(role) == "out":
        return weight_oi @ map_, bias_o
    weight_hei = weight_oi.unflatten(0, (-1, map_.shape[1]))[kept]
    weight_ri = (map_.mT @ weight_hei).flatten(0, 1)
    if bias_o is None:
        return weight_ri, None
    return weight_ri, (map_.mT @ bias_o.view(-1, map_.shape[1], 1)[kept]).flatten()


def _rescaled(
    denoiser: nn.Module, group: Group, entry: Entry, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Attention divides by the root of the present head width: fold the difference into q."""
    if group.unscaled:
        return weight, bias
    scale = getattr(denoiser.get_submodule(group.layer), "scale", group.width**-0.5)
    factor = float(scale) * entry.width**0.5
    return weight * factor, None if bias is None else bias * factor


def _kept_heads(
    role: str, weight_oi: Tensor, bias_o: Tensor | None, heads: Tensor, group: Group
) -> tuple[Tensor, Tensor | None]:
    if stem(role) == "out":
        return weight_oi.unflatten(1, (group.heads, -1))[:, heads].flatten(1), bias_o
    kept = weight_oi.unflatten(0, (group.heads, -1))[heads].flatten(0, 1)
    return kept, None if bias_o is None else bias_o.unflatten(0, (group.heads, -1))[heads].flatten()


def _feed_forward(linears: Weights, group: Group, maps: Mapping[str, Tensor]) -> Weights:
    """Kept rows of `up` (values and gates alike); W_down' = W_S + W_R coupling."""
    units, coupling = maps["units"], maps["coupling"]
    weight, down_bias = linears["down"]
    down = weight.flatten(1)
    removed = torch.ones(group.width, dtype=torch.bool, device=units.device)
    removed[units] = False
    refit = down[:, units] + down[:, removed] @ coupling
    slim = {role: _rows(*linears[role], group, role, units) for role in linears if role != "down"}
    return slim | {"down": (refit.view(*refit.shape, *weight.shape[2:]), down_bias)}


def _rows(
    weight: Tensor, bias: Tensor | None, group: Group, role: str, kept: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The rows of an inward layer that belong to the units or channels that stay."""
    twice = group.rows(role, 1) == 2
    rows = torch.cat([kept, kept + group.width]) if twice else kept
    return weight[rows], None if bias is None else bias[rows]


def _resnet(layers: Weights, group: Group, maps: Mapping[str, Tensor]) -> Weights:
    """Kept channels of all that makes the inner map, and the second convolution's new kernel."""
    kept = {
        role: _rows(*layers[role], group, role, maps["channels"])
        for role in layers
        if role != "conv2"
    }
    return kept | {"conv2": (maps["weight"], layers["conv2"][1])}


def _parameters(denoiser: nn.Module, group: Group, role: str) -> tuple[Tensor, Tensor | None]:
    bias = layer_at(denoiser, group.paths[role]).bias
    weight = weight_of(denoiser, group, role).double()
    return weight, None if bias is None else bias.detach().double()


def _factor(layer: Layer, weight: Tensor, projection: Tensor) -> None:
    """Split a linear or convolution into two; its bias stays."""
    weight, projection = factors_of(layer, weight, projection)
    dense = layer.weight
    layer.weight = _parameter(weight, dense)
    layer.register_parameter("projection", _parameter(projection, dense))


def put_(denoiser: nn.Module, group: Group, weights: Weights) -> None:
    """Put the weights of `slim_weights` into the denoiser, in its own dtype."""
    if group.kind in FACTORED:
        _factor(layer_at(denoiser, group.layer), *(weight for weight, _ in weights.values()))
        return
    for role, own in weights.items():
        _put(denoiser, group, role, *own)


def _put(denoiser: nn.Module, group: Group, role: str, weight: Tensor, bias: Tensor | None) -> None:
    layer = layer_at(denoiser, group.paths[role])
    dense = layer.weight
    if role in group.columns:
        start, stop = group.columns[role]
        before, after = dense.detach()[:, :start], dense.detach()[:, stop:]
        weight = torch.cat([before, weight.to(dense.dtype), after], 1)
    if isinstance(layer, nn.GroupNorm):
        layer.num_groups = layer.num_groups * len(weight) // layer.num_channels
        layer.num_channels = len(weight)
    elif isinstance(layer, nn.Conv2d):
        layer.out_channels = len(weight)
        layer.groups = len(weight) if role == "depth" else 1
        layer.in_channels = weight.shape[1] * layer.groups
    else:
        layer.out_features, layer.in_features = weight.shape
    layer.weight = _parameter(weight, dense)
    if bias is not None:
        layer.bias = _parameter(bias, dense)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    value = value.to(device=like.device, dtype=like.dtype).contiguous()
    return nn.Parameter(value, requires_grad=like.requires_grad)
