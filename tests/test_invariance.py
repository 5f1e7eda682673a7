"""What the function does not see, its decomposition does not see: factors that one layer puts on a
channel and the next takes off again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimdiff
from slimdiff.groups import Group
from tiny_models import TINY_MODELS

SPREAD = 2.5
"""Factors are exp(SPREAD N(0, 1)): between 1/150 and 150 for nineteen of twenty channels."""


def rows_times_(layer: Any, factor_i: Tensor) -> None:
    """Scale the first outputs of a layer."""
    for own in (layer.weight, layer.bias):
        if own is not None:
            own[: len(factor_i)] *= factor_i.view(-1, *[1] * (own.ndim - 1))


def columns_over_(layer: Any, factor_i: Tensor, columns: slice) -> None:
    layer.weight[:, columns] /= factor_i.view(-1, *[1] * (layer.weight.ndim - 2))


@torch.no_grad()
def rescale_(model: nn.Module, group: Group, generator: torch.Generator) -> bool:
    """Scale the inner channels of a group as the model cannot tell; whether there is a way."""
    layers = {role: model.get_submodule(path) for role, path in group.paths.items()}
    factor_i = torch.exp(SPREAD * torch.randn(group.inner, generator=generator).double())
    if group.kind == "value_output":
        inward, outward = group.streams("v"), group.streams("out")
    elif group.kind == "feed_forward" and (group.gated or "gate" in layers):
        inward, outward = ["depth" if "depth" in layers else "up"], ["down"]
    elif group.kind == "query_key" and not any(role.startswith("norm") for role in layers):
        for role in group.streams("q"):
            rows_times_(layers[role], factor_i)
        for role in group.streams("k"):
            rows_times_(layers[role], 1 / factor_i)
        return True
    else:
        return False
    for role in inward:
        rows_times_(layers[role], factor_i)
    for role in outward:
        columns_over_(layers[role], factor_i, group.input_columns(role))
    return True


def slimmed(model: Any, inputs: list[dict[str, Any]]) -> Any:
    """Slim, to widths that do not depend on errors."""
    with slimdiff.record(model) as statistics:
        for call in inputs:
            model(**call)
    budget = slimdiff.Budget(params=0.9)
    layers = ["attention", "feed_forward"]
    plan = slimdiff.allocate(model, statistics, budget, allocation="uniform", layers=layers)
    return slimdiff.rewrite(model, statistics, plan)


def doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: doubled(own) for name, own in value.items()}
    return [doubled(own) for own in value] if isinstance(value, list) else value


def output_of(model: Any, call: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        output = model(**call)
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().sum() / b.square().sum())


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "pixart", "sana", "t5"])
def test_factors_that_cancel_change_nothing(name: str) -> None:
    model, inputs = TINY_MODELS[name]()
    model, inputs = model.double(), doubled(inputs)
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    scaled = [rescale_(other, group, generator) for group in slimdiff.groups_of(other)]
    assert any(scaled)
    dense = output_of(model, inputs[0])
    assert difference(output_of(other, inputs[0]), dense) < 1e-14, "the same function"
    plain, balanced = (output_of(slimmed(own, inputs), inputs[0]) for own in (model, other))
    lost = difference(plain, dense)
    assert 1e-9 < lost < 1, "something was taken"
    assert difference(balanced, plain) < 1e-6 * lost
