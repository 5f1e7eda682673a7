"""Budgets that are measured: a time, an error; and the profile of the layers' times."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slimdiff
from slimdiff import layer_timing, profiling
from slimdiff.cli import main
from slimdiff.curves import probes_of
from slimdiff.fitting import TOLERANCE, Timed, fit_error, fit_speedup, measured_error, timed
from slimdiff.heads import halves_of
from slimdiff.prices import ascending
from slimdiff.profile import Profile
from slimdiff.shapes import slim_config
from slimdiff.widths import measure_curves
from tiny_models import TINY_MODELS
from tiny_pipeline import tiny_pipeline

DENSE = 10**9


def plan_of(limit: float) -> slimdiff.Plan:
    return slimdiff.Plan("Toy", "slimdiff", {}, figures={"limit": limit})


def timing(factor: float):
    """A machine on which a plan of some limit takes `factor` of it, and 1/10 that stays."""

    def time(plan: slimdiff.Plan) -> Timed:
        seconds = 0.1 + 0.9 * (plan.figures["limit"] / DENSE) * factor
        return Timed(1.0, seconds, 1 / seconds)

    return time


@given(factor=st.floats(0.8, 1.3), wanted=st.floats(1.1, 2.5))
def test_the_measured_speedup_is_what_was_asked(factor, wanted):
    plan = fit_speedup(plan_of, timing(factor), DENSE, DENSE // 20, wanted)
    speedup = plan.figures["latency"]["speedup"]
    assert abs(speedup / wanted - 1) <= TOLERANCE or plan.figures["limit"] == DENSE


def test_what_was_fast_by_luck_is_timed_again():
    true, lucky = timing(1.0), iter([1.3])

    def time(plan: slimdiff.Plan) -> Timed:
        own = true(plan)
        speedup = own.speedup * next(lucky, 1.0)
        return Timed(own.dense, own.dense / speedup, speedup)

    plan = fit_speedup(plan_of, time, DENSE, DENSE // 20, 2.0)
    assert true(plan).speedup >= 2.0 * (1 - TOLERANCE)


def test_what_cannot_be_reached_is_refused_with_the_best_that_can():
    with pytest.raises(slimdiff.SlimdiffError, match=r"the fastest that was measured is 1\.82"):
        fit_speedup(plan_of, timing(1.0), DENSE, DENSE // 2, 3.0)


@given(factor=st.floats(0.3, 5.0), largest=st.floats(1e-6, 1e-1))
def test_the_measured_error_stays_within_what_may_be_lost(factor, largest):
    plan = fit_error(plan_of, lambda p: factor * p.figures["limit"], largest)
    assert 0.7 * largest <= plan.figures["measured_error"] <= largest


def test_an_error_that_never_falls_is_refused():
    with pytest.raises(slimdiff.SlimdiffError, match=r"least error that was measured is 5\.00e-01"):
        fit_error(plan_of, lambda p: 0.5, 1e-3)


@given(
    times=st.dictionaries(st.integers(1, 64), st.floats(1e-6, 1.0), min_size=2),
    widths=st.lists(st.integers(1, 80), min_size=2, unique=True),
)
def test_a_narrower_layer_is_no_slower_and_none_is_slower_than_it_was_timed(times, widths):
    found = Profile({}, 1.0, {"layer": times}, {"layer": 0.5})
    seconds = [found.of("layer", width) for width in sorted(widths)]
    assert all(a <= b for a, b in pairwise(seconds))
    assert all(found.of("layer", width) <= timed for width, timed in times.items())
    assert seconds[0] >= min(times.values())
    for width in widths:
        fewer = [found.of("layer", width, share / 4) for share in range(1, 5)]
        assert all(a <= b for a, b in pairwise(fewer)) and fewer[0] <= fewer[-1]
        assert fewer[0] >= min(0.5, fewer[-1])


def test_profile_interpolates_between_widths_and_heads():
    found = Profile({}, 1.0, {"layer": {8: 0.1, 16: 0.3}}, {"layer": 0.05})
    assert [found.of("layer", w) for w in (4, 8, 12, 16)] == pytest.approx([0.1, 0.1, 0.2, 0.3])
    assert [found.of("layer", w, 0.5) for w in (8, 16)] == pytest.approx([0.075, 0.175])
    unknown = Profile({}, 1.0, {"layer": {8: 0.1, 16: 0.3}})
    assert unknown.of("layer", 16, 0.5) == 0.3, "what was not timed saves nothing"


@given(prices=st.lists(st.integers(-5, 20), min_size=1))
def test_prices_are_made_strictly_ascending(prices):
    found = ascending(prices)
    assert all(a < b for a, b in pairwise(found)) and found[-1] == prices[-1]
    assert all(own <= given_ for own, given_ in zip(found, prices, strict=True))
    assert ascending(found) == found


@pytest.fixture(scope="module")
def model():
    unet, inputs = TINY_MODELS["sd1"]()
    with slimdiff.record(unet) as statistics:
        for call in inputs:
            unet(**call)
    return unet, statistics, measure_curves(unet, statistics)


def test_profile_times_every_layer_once_per_machine(model, tmp_path: Path):
    unet, statistics, _ = model
    groups, call = slimdiff.groups_of(unet), statistics.probes.batches(2)[0]
    before = {name: p.clone() for name, p in unet.named_parameters()}
    state = torch.random.get_rng_state()
    found = profiling.profile(unet, groups, call, folder=tmp_path)
    assert set(found.layers) == {group.layer for group in groups}
    for group in groups:
        assert max(found.layers[group.layer]) == group.width
    assert set(found.fixed) == {group.layer for group, _ in halves_of(groups)}
    assert all(
        0 <= fixed <= max(found.layers[layer].values()) for layer, fixed in found.fixed.items()
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters())
    assert profiling.profile(unet, groups, call, folder=tmp_path) == found
    next(tmp_path.glob("profile-*.json")).write_text("{")
    again = profiling.profile(unet, groups, call, folder=tmp_path)
    assert set(again.layers) == set(found.layers) and again != found


@pytest.mark.parametrize("name", ["dit", "sd3", "sdxl"])
def test_profiling_leaves_the_dense_weights_alone(name: str):
    denoiser, inputs = TINY_MODELS[name]()
    before = {key: value.clone() for key, value in denoiser.state_dict().items()}
    profiling.profile(denoiser, slimdiff.groups_of(denoiser), inputs[0])
    assert all(torch.equal(value, before[key]) for key, value in denoiser.state_dict().items())


def test_narrowed_denoiser_has_the_plans_shapes_and_shares_the_rest(model):
    unet, statistics, curves = model
    plan = slimdiff.allocate(unet, statistics, slimdiff.Budget(params=0.8), curves=curves)
    groups = slimdiff.groups_of(unet)
    slim = layer_timing.narrowed(unet, slim_config(unet, groups, plan.entries))
    assert sum(p.numel() for p in slim.parameters()) == plan.figures["params"]
    assert slim.conv_in.weight is unet.conv_in.weight
    assert timed(unet, groups, plan, statistics.probes.batches(2)[0]).speedup > 0


def test_measured_error_is_that_of_the_rewritten_model(model):
    import copy

    unet, statistics, curves = model
    plan = slimdiff.allocate(unet, statistics, slimdiff.Budget(params=0.8), curves=curves)
    probes = probes_of(unet, statistics)
    predicted = measured_error(probes, slimdiff.groups_of(unet), statistics, plan, curves)
    slim = copy.deepcopy(unet)
    after = probes_of(slim, statistics)
    slimdiff.rewrite(slim, statistics, plan, curves=curves)
    assert after.error({}) == pytest.approx(predicted, rel=1e-3)


def test_quality_and_time_are_budgets(model, tmp_path: Path):
    unet, statistics, curves = model
    how = {"curves": curves, "folder": tmp_path}
    plan = slimdiff.allocate(unet, statistics, slimdiff.Budget(quality=1e-3), **how)
    assert plan.figures["measured_error"] <= 1e-3
    assert plan.figures["macs"] < plan.figures["macs_dense"] and plan.budget == "--quality 0.001"
    plan = slimdiff.allocate(unet, statistics, slimdiff.Budget(latency="1s"), **how)
    assert plan.figures["latency"]["wanted"] == 1.0
    with pytest.raises(slimdiff.SlimdiffError, match="out of reach"):
        slimdiff.allocate(unet, statistics, slimdiff.Budget(speedup=1000), **how)


def test_what_does_not_go_together_is_refused(model):
    unet, statistics, _ = model
    fast, good = slimdiff.Budget(speedup=1.1), slimdiff.Budget(quality=1e-3)
    with pytest.raises(slimdiff.SlimdiffError, match="tied widths"):
        slimdiff.allocate(unet, statistics, fast, tied=False)
    with pytest.raises(slimdiff.SlimdiffError, match="predicted errors"):
        slimdiff.allocate(unet, statistics, good, allocation="uniform")


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"speedup": 0.5}, "at least 1"),
        ({"speedup": "fast"}, "expected a number"),
        ({"latency": "4 hours"}, "400ms"),
        ({"memory": "big"}, "1.2GB"),
        ({"quality": 2}, "at most 0.5"),
        ({"quality": 0.01, "speedup": 2}, "quality and speedup|speedup and quality"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(given_, message):
    with pytest.raises(slimdiff.SlimdiffError, match=message):
        slimdiff.Budget(**given_)


def test_memory_is_parameters_in_the_denoisers_dtype(model):
    unet, statistics, curves = model
    params = sum(p.numel() for p in unet.parameters())
    budget = slimdiff.Budget(memory=f"{int(0.8 * params * 4)}B")
    plan = slimdiff.allocate(unet, statistics, budget, curves=curves)
    assert 0.78 * params < plan.figures["params"] <= 0.8 * params


def test_command_line_takes_measured_budgets(tmp_path: Path, monkeypatch, capsys):
    tiny_pipeline(seed=0).save_pretrained(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    monkeypatch.chdir(tmp_path)
    how = ["--prompts", "prompts.txt", "--steps", "2", "--batch-size", "2", "--device", "cpu"]

    def compress(*budget: str):
        with pytest.raises(SystemExit) as done:
            main(["compress", "tiny", "-o", "slim", *how, "--no-report", *budget])
        return done.value.code, capsys.readouterr()

    code, printed = compress("--quality", "0.05")
    assert not code and "--quality 0.05" in printed.out
    plan = slimdiff.Plan.read(tmp_path / "slim" / "unet" / "slimdiff.json")
    assert plan.figures["measured_error"] <= 0.05
    code, printed = compress("--latency", "10s")
    assert not code and "times faster" in printed.out
    code, printed = compress("--speedup", "1000")
    assert code == 2 and "out of reach" in printed.err and "Traceback" not in printed.err
    assert (tmp_path / "slim" / "model_index.json").is_file()
    code, printed = compress("--speedup", "2", "--quality", "0.1")
    assert code == 2 and "exactly one" in printed.err
    code, printed = compress("--memory", "much")
    assert code == 2 and "1.2GB" in printed.err
