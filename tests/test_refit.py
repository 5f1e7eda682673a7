"""Refitting whole denoisers: what it may change, what it must not, and that it helps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimdiff
from slimdiff.errors import SlimdiffError
from slimdiff.refit import RefitResult, RefitSettings, refit
from slimdiff.refitting import replay
from slimdiff.refitting.sites import tensors_in
from test_refit_parts import slim_of
from tiny_models import TINY_MODELS

DENOISERS = sorted(name for name in TINY_MODELS if not name.startswith(("clip", "t5")))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def many_calls(calls: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """More calls of the same shapes, their noise drawn anew."""
    chance = torch.Generator().manual_seed(3)

    def drawn(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: drawn(part) for name, part in value.items()}
        noisy = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2
        return torch.randn(value.shape, generator=chance) if noisy else value

    return [drawn(calls[i % len(calls)]) for i in range(count)]


@pytest.mark.parametrize("name", DENOISERS)
def test_every_family_is_refit_or_left_in_peace(name: str) -> None:
    dense, slim, calls = slim_of(name, 0.93)
    before, dense_before = state(slim), state(dense)
    modules = {path: type(module) for path, module in slim.named_modules()}
    result = refit(dense, slim, calls[:3], calls[3:], RefitSettings(rows_per_input=2.0))
    assert_harmless(result, slim, before)
    assert {path: type(module) for path, module in slim.named_modules()} == modules
    assert not [m for m in slim.modules() if "forward" in vars(m) or m._forward_pre_hooks]
    for key, value in dense.state_dict().items():
        assert torch.equal(value, dense_before[key])
    with torch.no_grad():
        assert all(y.isfinite().all() for y in tensors_in(slim(**calls[0], return_dict=False)))


def assert_harmless(result: RefitResult, slim: nn.Module, before: dict[str, Tensor]) -> None:
    assert result.layers
    assert all(layer.after <= layer.before for layer in result.layers)
    assert result.kept == (result.after < result.before)
    changed = {layer.path for layer in result.layers if layer.strength is not None}
    for key, value in slim.state_dict().items():
        assert value.isfinite().all() and value.dtype == before[key].dtype
        assert value.shape == before[key].shape
        if not result.kept or key.rpartition(".")[0] not in changed:
            assert torch.equal(value, before[key])


@pytest.fixture(scope="module")
def refitted() -> tuple[nn.Module, nn.Module, nn.Module, list[dict[str, Any]], RefitResult]:
    dense, slim, calls = slim_of("sd1", 0.7)
    before, calls = copy.deepcopy(slim), many_calls(calls, 40)
    return dense, before, slim, calls, refit(dense, slim, calls[:28], calls[28:34])


def error(dense: nn.Module, slim: nn.Module, calls: list[dict[str, Any]]) -> float:
    squared = energy = 0.0
    with torch.no_grad():
        for call in calls:
            own, want = slim(**call)[0], dense(**call)[0]
            squared += float((own - want).square().sum())
            energy += float(want.square().sum())
    return squared / energy


def test_the_error_falls_where_there_are_rows_enough(refitted: Any) -> None:
    dense, before, slim, calls, result = refitted
    assert result.kept
    unseen = calls[34:]
    assert error(dense, slim, unseen) < 0.8 * error(dense, before, unseen)
    assert result.before == pytest.approx(error(dense, before, calls[28:34]), rel=1e-4)
    assert result.after == pytest.approx(error(dense, slim, calls[28:34]), rel=1e-4)


def test_what_is_kept_between_runs_changes_no_weight(
    refitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, before, slim, calls, _ = refitted
    monkeypatch.setattr(replay.Replay, "_skipping", lambda self, path, forward: forward)
    again = copy.deepcopy(before)
    refit(dense, again, calls[:28], calls[28:34])
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, slim.state_dict()[key], rtol=1e-3, atol=1e-4)


def test_a_denoiser_that_lost_nothing_stays_as_it_is() -> None:
    model, calls = TINY_MODELS["dit"]()
    same = copy.deepcopy(model)
    before = state(same)
    result = refit(model, same, calls[:2], calls[2:])
    assert (result.before, result.kept) == (0.0, False)
    for key, value in same.state_dict().items():
        assert torch.equal(value, before[key])


def test_one_sample_many_times_gives_finite_weights() -> None:
    dense, slim, calls = slim_of("dit", 0.93)
    result = refit(dense, slim, calls[:1] * 3, calls[1:])
    assert all(value.isfinite().all() for value in slim.state_dict().values())
    assert all(layer.after <= layer.before for layer in result.layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays(dtype: torch.dtype) -> None:
    dense, slim, calls = slim_of("dit", 0.93)
    dense, slim = dense.to(dtype), slim.to(dtype)
    calls = [
        {name: x.to(dtype) if x.is_floating_point() else x for name, x in call.items()}
        for call in calls
    ]
    refit(dense, slim, calls[:3], calls[3:])
    assert {p.dtype for p in slim.parameters()} == {dtype}
    assert all(value.isfinite().all() for value in slim.state_dict().values())


def test_a_refitted_model_is_saved_and_loaded_as_it_is(refitted: Any, tmp_path: Any) -> None:
    _, _, slim, calls, _ = refitted
    slimdiff.save(slim, tmp_path / "slim")
    loaded = slimdiff.load(tmp_path / "slim")
    with torch.no_grad():
        assert torch.equal(loaded(**calls[0])[0], slim(**calls[0])[0])


def test_without_calls_it_says_what_to_give() -> None:
    model, calls = TINY_MODELS["dit"]()
    with pytest.raises(SlimdiffError, match="0 calls to refit on and 4 to judge by"):
        refit(model, copy.deepcopy(model), [], calls)
