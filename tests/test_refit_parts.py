"""The parts of a refit: regressions against oracles, rows, sites, and runs that skip parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimdiff
from slimdiff.decompose.ridge import Moments, Rows, chosen_steps, ridge_step
from slimdiff.evaluate.sampling import one_row_of
from slimdiff.probes import Probes
from slimdiff.refitting.calls import count_of, samples_of, thinned
from slimdiff.refitting.layers import candidates, units
from slimdiff.refitting.replay import Replay
from slimdiff.refitting.rows import choose_places, inputs_at, picked, places_of
from slimdiff.refitting.sites import changed
from slimdiff.refitting.weights import add_, inputs_of, matrix_of, rank_kept
from slimdiff.slim_denoiser import DoublingConv2d, FactoredConv2d, FactoredLinear
from tiny_models import TINY_MODELS


def rows(n: int, inputs: int, outputs: int, seed: int = 0, noise: float = 0.3) -> Rows:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=chance).double()
    truth = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(9)).double()
    return Rows(x, x @ truth + noise * torch.randn(n, outputs, generator=chance))


def loss(given: Rows, step: Tensor | None = None) -> float:
    return float(given.losses(step).sum())


def moments(*parts: Rows) -> Moments:
    sums = Moments()
    for part in parts:
        sums.add(part)
    return sums


def test_ridge_step_is_least_squares_on_rows_with_the_penalty_among_them() -> None:
    given = rows(60, 5, 3)
    c, b = moments(given).normal
    root = (0.3 * given.x_ni.square().sum(0)).sqrt().diag()
    oracle = torch.linalg.lstsq(
        torch.cat([given.x_ni, root]), torch.cat([given.r_no, torch.zeros(5, 3).double()])
    ).solution
    torch.testing.assert_close(ridge_step(c, b, 0.3), oracle)


def test_gates_that_are_products_and_weights_give_the_weighted_least_squares() -> None:
    given = rows(80, 4, 3)
    chance = torch.Generator().manual_seed(3)
    per_row, per_output, w = (torch.rand(n, generator=chance).double() + 0.2 for n in (80, 3, 80))
    gates = per_row[:, None] * per_output
    weighted = Rows(given.x_ni, given.r_no, gates, w)
    c, b = moments(weighted).normal
    got = ridge_step(c, b, 0.0)
    for o in range(3):
        scale = w.sqrt()[:, None] * gates[:, o : o + 1]
        left, right = scale * given.x_ni, w.sqrt()[:, None] * given.r_no[:, o : o + 1]
        torch.testing.assert_close(got[:, o : o + 1], torch.linalg.lstsq(left, right).solution)


def test_moments_do_not_depend_on_how_rows_come() -> None:
    parts = [rows(n, 6, 2, seed=n) for n in (3000, 2000, 7)]
    c, b = moments(*parts).normal
    whole = torch.cat([part.x_ni for part in parts])
    torch.testing.assert_close(c, whole.mT @ whole)
    torch.testing.assert_close(b, whole.mT @ torch.cat([part.r_no for part in parts]))


@pytest.mark.parametrize("n", [2, 40, 400])
def test_a_chosen_step_never_loses_more_on_held_out_rows(n: int) -> None:
    held_out = rows(50, 30, 4, seed=100)
    [step] = chosen_steps(moments(rows(n, 30, 4)), held_out, [4])
    assert step.before == pytest.approx(loss(held_out))
    assert step.after <= step.before
    if step.step_io is not None:
        assert loss(held_out, step.step_io) == pytest.approx(step.after)
        assert step.after < step.before


def test_layers_of_the_same_inputs_are_solved_as_each_alone() -> None:
    both, held_out = rows(60, 8, 5), rows(40, 8, 5, seed=7)
    got = chosen_steps(moments(both), held_out, [2, 3])
    for own, part in zip(got, (slice(0, 2), slice(2, 5)), strict=True):
        alone = [Rows(given.x_ni, given.r_no[:, part]) for given in (both, held_out)]
        [want] = chosen_steps(moments(alone[0]), alone[1], [part.stop - part.start])
        assert own.strength == want.strength
        torch.testing.assert_close(own.step_io, want.step_io)
        assert own.after == pytest.approx(want.after)


def test_more_rows_choose_a_weaker_ridge_and_noise_none() -> None:
    held_out = rows(200, 30, 4, seed=100, noise=9.0)
    few, many = (
        chosen_steps(moments(rows(n, 30, 4, noise=9.0)), held_out, [4])[0] for n in (40, 4000)
    )
    assert few.strength is not None and many.strength is not None
    assert many.strength < few.strength
    chance = torch.Generator().manual_seed(0)
    noise = [Rows(torch.randn(9, 30, generator=chance), torch.randn(9, 4, generator=chance))] * 2
    unlike = Rows(noise[0].x_ni, -noise[0].r_no)
    assert chosen_steps(moments(noise[0]), unlike, [4])[0].step_io is None


def test_singular_moments_give_finite_steps() -> None:
    x = torch.zeros(8, 5)
    x[:, 1] = x[:, 2] = torch.arange(8.0)  # two alike, three that never occurred
    given = Rows(x, torch.ones(8, 2))
    step = ridge_step(*moments(given).normal, 1e-4)
    assert step.isfinite().all()
    assert step[0].abs().max() == 0
    assert loss(given, step) < loss(given)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5), (2, 7, 6)),
    "no bias": (nn.Linear(6, 5, bias=False), (2, 6)),
    "3 by 3": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 5)),
    "strided": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 8, 6)),
    "uneven": (nn.Conv2d(3, 4, (3, 1), padding=(2, 0), dilation=(2, 1), bias=False), (2, 3, 8, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_matrix_are_the_outputs(name: str) -> None:
    layer, shape = LAYERS[name]
    check_rows(layer, torch.randn(shape), {})


def check_rows(layer: Any, x: Tensor, more: dict[str, Any]) -> None:
    with torch.no_grad():
        y = layer(x, **more)
    places = choose_places(4, places_of(layer, y), len(y), "chance")
    assert places.shape == (len(y), min(4, places_of(layer, y)))
    got = inputs_at(layer, ((x,), more), places).double()
    assert got.shape[1] == inputs_of(layer) + (layer.bias is not None)
    columns = [matrix_of(layer), *([] if layer.bias is None else [layer.bias[:, None].double()])]
    want = picked(layer, y, places).double()
    torch.testing.assert_close(got @ torch.cat(columns, 1).mT, want, rtol=1e-4, atol=1e-5)


def factored(kind: type, dense: Any, rank: int) -> Any:
    layer = copy.deepcopy(dense)
    layer.__class__ = kind
    inputs = layer.weight.shape[1:]
    layer.weight = nn.Parameter(torch.randn(len(dense.weight), rank, *[1] * (len(inputs) - 1)))
    layer.projection = nn.Parameter(torch.randn(rank, *inputs))
    return layer


def test_rows_of_factored_layers_and_of_fused_upsamplers() -> None:
    check_rows(factored(FactoredLinear, nn.Linear(6, 5), 2), torch.randn(2, 7, 6), {})
    conv = nn.Conv2d(3, 4, 3, padding=1)
    check_rows(factored(FactoredConv2d, conv, 2), torch.randn(2, 3, 6, 5), {})
    conv.__class__ = DoublingConv2d
    check_rows(conv, torch.randn(2, 3, 6, 5), {"double": True})


@pytest.mark.parametrize("bias", [True, False])
def test_a_factored_layer_gets_the_best_step_of_its_rank(bias: bool) -> None:
    """Reduced-rank regression, against the SVD of the whitened matrix (Eckart-Young)."""
    layer = factored(FactoredLinear, nn.Linear(6, 5, bias=bias), 2)
    x = torch.randn(50, 6, dtype=torch.float64) + (1.0 if bias else 0.0)
    wanted = torch.randn(6 + bias, 5, dtype=torch.float64)
    given = F.pad(x, (0, 1), value=1.0) if bias else x
    nearest = rank_kept(layer)
    assert nearest is not None
    step = nearest(wanted, given.mT @ given)
    full = matrix_of(layer) + wanted[:6].mT
    centred = x - x.mean(0) if bias else x
    lost = torch.linalg.svdvals(centred @ full.mT)[2:].square().sum()
    missed = given @ (wanted - step)
    torch.testing.assert_close(missed.square().sum(), lost)
    before = layer(x.float())
    add_(layer, step)
    assert layer.weight.shape[1] == 2
    change = (layer(x.float()) - before).double()
    torch.testing.assert_close(change, given @ step, rtol=1e-4, atol=1e-4)


def slim_of(name: str, share: float = 0.8) -> tuple[nn.Module, nn.Module, list[dict[str, Any]]]:
    """Dense, slim, and calls."""
    model, calls = TINY_MODELS[name]()
    dense = copy.deepcopy(model)
    with slimdiff.record(model) as statistics, torch.no_grad():
        for call in calls:
            model(**call)
    budget = slimdiff.Budget(params=share)
    plan = slimdiff.allocate(model, statistics, budget, allocation="uniform")
    return dense, slimdiff.rewrite(model, statistics, plan), calls


SITES = {
    "sd1": {
        "attn1.to_out.0": "norm2 in",
        "attn2.to_out.0": "norm3 in",
        "ff.net.2": " out",
        "conv2": " out",
        "conv_shortcut": " out",
        "proj_out": " out",
    },
    "sd3": {
        "attn.to_out.0": "norm2 in",
        "attn.to_add_out": "norm2_context in",
        "ff.net.2": " out",
        "ff_context.net.2": " out",
    },
    "dit": {"attn1.to_out.0": "norm3 in", "ff.net.2": " out"},
}


@pytest.mark.parametrize("name", SITES)
def test_outputs_are_found_in_the_stream_that_they_are_added_to(name: str) -> None:
    dense, slim, calls = slim_of(name, 0.9)
    one = one_row_of(calls[0])
    for layer in candidates(dense, slim, slimdiff.groups_of(slim), one):
        for ending, place in SITES[name].items():
            if layer.path.endswith(f".{ending}"):
                block = layer.path.removesuffix(f".{ending}")
                block = block.removesuffix(".proj_out")
                assert f"{layer.site.path} {layer.site.side}" == f"{block}.{place}".replace(
                    ". ", " "
                )
                check_gate(slim, layer, calls[0])


def check_gate(slim: nn.Module, layer: Any, call: dict[str, Any]) -> None:
    """A change of the output reaches the stream in proportion, and by the gate if it has one."""
    replay = Replay(slim, [call], [layer.path])
    module = slim.get_submodule(layer.path)
    _, [y], before = replay.seen(0, [layer.path], layer.site)
    moved = []
    for size in (0.5, 1.5):
        with changed(module, lambda y, size=size: size * torch.sin(7 * y)):
            moved.append(replay.seen(0, [layer.path], layer.site)[2] - before)
    torch.testing.assert_close(moved[1], 3 * moved[0], rtol=1e-3, atol=1e-4)
    if not layer.site.gated:
        want = layer.site.gate * 0.5 * torch.sin(7 * y)
        torch.testing.assert_close(moved[0], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_replayed_runs_are_whole_runs_whatever_was_kept(name: str) -> None:
    dense, slim, calls = slim_of(name, 0.9)
    one, groups = one_row_of(calls[0]), slimdiff.groups_of(slim)
    layers = [layer for layer in candidates(dense, slim, groups, one)]
    replay = Replay(slim, calls[:2], [layer.path for layer in layers])
    chance = torch.Generator().manual_seed(0)
    with replay.keeping(units(slim, groups, one)):
        for layer in layers:
            for index in range(2):
                got = replay.seen(index, [layer.path], layer.site)
                plain = Replay(slim, calls[:2], []).seen
                kept, skipped = got, None
                with unkept(slim):
                    skipped = plain(index, [layer.path], layer.site)
                torch.testing.assert_close(kept[2], skipped[2])
            weight: Any = slim.get_submodule(layer.path).weight
            weight.data.mul_(1 + 0.01 * torch.rand((), generator=chance))
            replay.finish(layer.path)
        for index, call in enumerate(calls[:2]):
            got = replay.run(index)
            with unkept(slim), torch.no_grad():
                torch.testing.assert_close(got[0], slim(**call)[0])


class unkept:
    """A model without the functions that stand in for its modules' own."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {m: vars(m).pop("forward") for m in model.modules() if "forward" in vars(m)}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        for module, forward in self.own.items():
            module.forward = forward


def test_samples_are_drawn_from_every_call_and_joined() -> None:
    calls = [
        {
            "x": torch.arange(8.0).view(8, 1) + 10 * i,
            "timestep": torch.tensor(float(i)),
            "sizes": [4] * 8,
            "positions": torch.ones(3, 2),
        }
        for i in range(10)
    ]
    assert [count_of(call) for call in calls] == [8] * 10
    seen = [samples_of(call, i) for i, call in enumerate(calls)]
    kept = thinned(seen, 40)
    assert {probe.timestep for probe in kept} == set(range(10))
    [joined] = Probes(len(kept), rows={p.key: p for p in kept}).batches(80)
    assert 30 <= len(joined["x"]) <= 50
    x = joined["x"].flatten()
    assert torch.equal((x / 10).floor(), joined["timestep"])
    assert joined["sizes"] == [4] * len(x)
    assert joined["positions"].shape == (3, 2)
    assert len(thinned(seen, 1000)) == 80
