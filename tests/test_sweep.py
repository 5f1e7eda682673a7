"""Layers that see the timestep alone: their moments hold at steps that were not sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import slimdiff
from slimdiff.sweep import sweep_timesteps
from tiny_models import TINY_MODELS

SETTINGS = (0, 8, 256, torch.float64)


def recorded(name: str) -> tuple[Any, slimdiff.Statistics, list[dict[str, Any]]]:
    """Of calls at one timestep."""
    model, inputs = TINY_MODELS[name]()
    calls = [call | {"timestep": torch.full_like(call["timestep"], 500)} for call in inputs]
    with slimdiff.record(model) as statistics:
        for call in calls:
            model(**call)
    return model, statistics, calls


def inputs_of(model: Any, layer: str, call: dict[str, Any]) -> torch.Tensor:
    """What goes into a layer in one call, (n, i)."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    with torch.inference_mode():
        model(**call)
    hook.remove()
    return seen[0].flatten(0, -2).double()


def unexplained(moment: torch.Tensor, x_ni: torch.Tensor) -> float:
    """Share of x outside of the directions that a moment holds."""
    values, vectors = torch.linalg.eigh(moment)
    kept = vectors[:, values > 1e-9 * values.max()]
    rest = x_ni - x_ni @ kept @ kept.mT
    return float(rest.square().sum() / x_ni.square().sum())


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
def test_moments_hold_between_the_timesteps_that_were_sampled(name: str) -> None:
    model, statistics, calls = recorded(name)
    group = next(g for g in slimdiff.groups_of(model) if g.kind == "modulation")
    moment = f"{group.source or group.layer}/x"
    other = calls[0] | {"timestep": torch.full_like(calls[0]["timestep"], 137)}
    x_ni = inputs_of(model, group.layer, other)
    before = {key: total.clone() for key, total in statistics.sums.items()}
    weights = dict(statistics.weights)
    lost = unexplained(statistics.mean(moment), x_ni)
    sweep_timesteps(model, None, statistics, statistics.probes, SETTINGS)
    assert unexplained(statistics.mean(moment), x_ni) < 0.1 * lost
    assert statistics.weights[moment] == pytest.approx(2 * weights[moment])
    changed = {key for key, total in before.items() if not torch.equal(total, statistics.sums[key])}
    modulations = {g.source or g.layer for g in slimdiff.groups_of(model) if g.kind == "modulation"}
    assert {key.rsplit("/", 1)[0] for key in changed} == modulations


def test_a_unet_has_nothing_to_sweep() -> None:
    model, statistics, _ = recorded("sd1")
    before = dict(statistics.weights)
    sweep_timesteps(model, None, statistics, statistics.probes, SETTINGS)
    assert statistics.weights == before
