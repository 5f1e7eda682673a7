"""Weights: a layer as one matrix, factored or not, and a step added to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.decompose.low_rank import projection
from slimdiff.layers import factors_of, sides_of

Saved = dict[str, tuple[Tensor, Tensor | None, Tensor | None]]

_PARAMETERS = ("weight", "bias", "projection")


def inputs_of(layer: Any) -> int:
    """Inputs of a layer's matrix, all taps of a convolution, without the one for its bias."""
    return sides_of(layer)[1]


def matrix_of(layer: Any) -> Tensor:
    """The matrix (o, i) of a layer in float64, of a factored one the product of its factors."""
    weight_oi = layer.weight.detach().double().flatten(1)
    inner = getattr(layer, "projection", None)
    return weight_oi if inner is None else weight_oi @ inner.detach().double().flatten(1)


def add_(layer: Any, step_io: Tensor) -> None:
    """Add a step (i, o), the last row for the bias, to a layer in place; its rank stays."""
    matrix_oi = matrix_of(layer)
    inputs = matrix_oi.shape[1]
    matrix_oi = matrix_oi + step_io[:inputs].mT.to(matrix_oi)
    if getattr(layer, "projection", None) is None:
        layer.weight = _parameter(matrix_oi.view(layer.weight.shape), layer.weight)
    else:
        factors = projection(matrix_oi, matrix_oi @ matrix_oi.mT).maps(layer.weight.shape[1])
        pair = factors_of(layer, factors["weight"], factors["projection"])
        dense = layer.weight
        layer.weight, layer.projection = (_parameter(own, dense) for own in pair)
    if layer.bias is not None:
        bias_o = layer.bias.detach().double() + step_io[inputs].to(layer.bias.device)
        layer.bias = _parameter(bias_o, layer.bias)


def rank_kept(layer: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """For a factored layer: any step (i, o), and the moment (i, i) of its inputs -> the nearest
    step after which the layer's rank is what it is now."""
    if getattr(layer, "projection", None) is None:
        return None
    matrix_oi, rank = matrix_of(layer), layer.weight.shape[1]
    inputs, biased = matrix_oi.shape[1], layer.bias is not None

    def nearest(step_io: Tensor, c_ii: Tensor) -> Tensor:
        wanted_oi = matrix_oi + step_io[:inputs].mT
        moment_ii = c_ii[:inputs, :inputs]
        if biased:  # the last input is 1: its products are sums
            mean_i = c_ii[inputs, :inputs] / c_ii[inputs, inputs]
            moment_ii = moment_ii - mean_i[:, None] * c_ii[inputs, :inputs]
        factors = projection(wanted_oi, wanted_oi @ moment_ii @ wanted_oi.mT).maps(rank)
        reached_oi = factors["weight"] @ factors["projection"]
        step = (reached_oi - matrix_oi).mT
        if biased:
            lost_o = (wanted_oi - reached_oi) @ mean_i
            step = torch.cat([step, (step_io[inputs] + lost_o)[None]])
        return step

    return nearest


def saved(model: nn.Module, paths: Sequence[str]) -> Saved:
    """The parameters of layers as they are."""
    layers = {path: model.get_submodule(path) for path in paths}
    return {
        path: tuple(getattr(layer, name, None) for name in _PARAMETERS)  # type: ignore[misc]
        for path, layer in layers.items()
    }


def restore_(model: nn.Module, weights: Saved) -> None:
    """Put saved parameters back."""
    for path, parameters in weights.items():
        layer = model.get_submodule(path)
        for name, value in zip(_PARAMETERS, parameters, strict=True):
            if value is not None:
                setattr(layer, name, value)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    value = value.to(device=like.device, dtype=like.dtype).contiguous()
    return nn.Parameter(value, requires_grad=like.requires_grad)
