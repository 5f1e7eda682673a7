"""Whole heads under the probed allocation: when they go, and that all figures agree on it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import slimdiff
from slimdiff import costs as costs_
from slimdiff.bundles import WORTH, Allocation, Bundle, Size, between, with_fewer_heads
from slimdiff.config import RECIPES
from slimdiff.curve_file import CurveFile
from slimdiff.curves import ErrorCurve, effective_weights, probes_of
from slimdiff.fitting import measured_error
from slimdiff.groups import Group
from slimdiff.heads import halves_of, kept_heads
from slimdiff.jobs import Job
from slimdiff.prices import least_nanoseconds
from slimdiff.profile import Profile
from slimdiff.recipes import maps_of
from slimdiff.streaming import rewrite_folder
from slimdiff.widths import measure_curves
from test_contract import CASES, NOT_OF_ITS_CONFIG, Case, case, output_of, outputs
from tiny_models import TINY_MODELS

__all__ = ["case"]

SELF = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CROSS = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"


KEEP_HEADS = {
    *("cogvideox", "flux", "hunyuan_dit", "qwen_image", "sd35"),
    *("t5", "t5_plain", "wan", "wan_image"),
}
"""Models whose queries and keys stay as they are, or whose heads have biases of their own."""

FEWER = pytest.mark.parametrize("case", sorted(set(TINY_MODELS) - KEEP_HEADS), indirect=True)


@CASES
def test_heads_go_where_queries_and_keys_narrow(case: Case, request: Any) -> None:
    assert (halves_of(case.groups) == []) == (request.node.callspec.id in KEEP_HEADS)


def one_head(case: Case, share: float = 0.5) -> slimdiff.Plan:
    """One head of two in every layer where heads may go, narrowed to a share of its width."""
    entries = {
        g.name: slimdiff.Entry(g.kind, int(share * g.width), g.width, 1, g.heads)
        for pair in halves_of(case.groups)
        for g in pair
    }
    return case.plan(entries)


@FEWER
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_slim_layers_behave_as_their_effective_dense_weights(case: Case, share: float) -> None:
    plan, recipe = one_head(case, share), RECIPES["slimdiff"]
    kept = kept_heads(case.model, case.groups, case.statistics, plan)
    swapped: dict[str, Tensor] = {}
    for group in plan.changed(case.groups):
        entry, which = plan.entries[group.name], kept[group.layer]
        maps = maps_of(case.model, group, case.statistics, recipe, entry, kept=which)
        assert maps["heads"].tolist() == which.tolist() and len(which) == 1
        swapped |= effective_weights(case.model, group, maps)
    slim = slimdiff.rewrite(case.copy(), case.statistics, plan)
    with torch.no_grad():
        for call, got in zip(case.inputs, outputs(slim, case.inputs), strict=True):
            call = call | {"return_dict": False}
            want = output_of(torch.func.functional_call(case.model, swapped, (), call))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=5e-5)


@FEWER
def test_slim_models_of_fewer_heads_are_counted_saved_and_compiled(
    case: Case, tmp_path: Path, request: Any
) -> None:
    plan = one_head(case)
    slim: Any = slimdiff.rewrite(case.copy(), case.statistics, plan)
    one_row = case.statistics.probes.batches(1)[0]
    dense = costs_.measure(case.model, case.groups, one_row)
    for metric, counted in (
        ("params", costs_.parameters(slim)),
        ("macs", costs_.measure(slim, slimdiff.groups_of(slim), one_row).macs),
    ):
        changed = plan.changed(case.groups)
        saved = sum(dense.groups[g.name].of(metric, g.inner - g.width // 2) for g in changed)
        assert dense.total(metric) - saved == counted
    torch.compiler.reset()
    compiled = torch.compile(slim, fullgraph=True, backend="eager")
    got, expected = outputs(compiled, case.inputs[:1]), outputs(slim, case.inputs[:1])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if request.node.callspec.id not in NOT_OF_ITS_CONFIG:
        slimdiff.save(slim, tmp_path / "slim")
        loaded = slimdiff.load(tmp_path / "slim")
        assert torch.equal(outputs(loaded, case.inputs[:1])[0], expected[0])
        assert loaded.slim_record.plan == plan
    for group in slimdiff.groups_of(slim):
        if group.name in plan.entries:
            assert (group.heads, group.width) == (1, plan.entries[group.name].width)


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_folders_are_rewritten_without_the_same_heads(name: str, tmp_path: Path) -> None:
    case = Case(name)
    plan = one_head(case)
    case.model.save_pretrained(tmp_path / "dense")
    slimdiff.save(slimdiff.rewrite(case.copy(), case.statistics, plan), tmp_path / "whole")
    case.statistics.save(tmp_path / "statistics")
    stored = slimdiff.Statistics.open(tmp_path / "statistics")
    rewrite_folder(tmp_path / "dense", tmp_path / "blocks", stored, plan)
    a, b = (slimdiff.load(tmp_path / folder).state_dict() for folder in ("whole", "blocks"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Planted:
    """A tiny UNet of four heads, two of which do nothing: one is not read, one is a copy."""

    def __init__(self) -> None:
        from tiny_models import _inputs, _unet

        self.unet, self.inputs = _unet(attention_head_dim=4), _inputs()
        self.groups = slimdiff.groups_of(self.unet)
        width = next(g.width for g in self.groups if g.layer == SELF)
        with torch.no_grad():
            for own in self.unet.parameters():  # attention counts for more than at random
                own.mul_(1.5) if own.ndim == 2 else None
            self.unet.get_submodule(SELF).to_out[0].weight[:, width : 2 * width] = 0
            for name in ("to_q", "to_k", "to_v"):
                weight = self.unet.get_submodule(CROSS).get_submodule(name).weight
                weight[3 * width :] = weight[:width]
        with slimdiff.record(self.unet) as self.statistics, torch.no_grad():
            self.dense = outputs(self.unet, self.inputs)
        self.curves = measure_curves(self.unet, self.statistics)

    def without(self) -> slimdiff.Plan:
        """The plan that takes what does nothing."""
        budget = slimdiff.Budget(params=1.0)
        plan = slimdiff.allocate(self.unet, self.statistics, budget, curves=self.curves)
        entries = {
            name: replace(entry, heads=3) if name[:-3] in (SELF, CROSS) else entry
            for name, entry in plan.entries.items()
        }
        return replace(plan, entries=entries)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


def relative(got: list[Tensor], dense: list[Tensor]) -> float:
    return sum(float((a - b).square().sum()) for a, b in zip(got, dense, strict=True)) / sum(
        float(b.square().sum()) for b in dense
    )


def test_heads_that_do_nothing_go_first_and_nothing_is_lost(
    planted: Planted, tmp_path: Path
) -> None:
    found = slimdiff.allocate(
        planted.unet, planted.statistics, slimdiff.Budget(quality=1e-7), curves=planted.curves
    )
    assert found.figures["heads_removed"] >= 2
    for layer, which in ((SELF, {1}), (CROSS, {0, 3})):
        entry = found.entries[f"{layer}.vo"]
        assert (entry.heads, entry.width) == (3, entry.dense_width)
        kept = kept_heads(planted.unet, planted.groups, planted.statistics, found, planted.curves)
        assert {0, 1, 2, 3} - set(kept[layer].tolist()) <= which
        again = kept_heads(planted.unet, planted.groups, planted.statistics, found)
        assert torch.equal(again[layer], kept[layer])
    plan = planted.without()
    slim = copy.deepcopy(planted.unet)
    slimdiff.rewrite(slim, planted.statistics, plan, curves=planted.curves)
    assert relative(outputs(slim, planted.inputs), planted.dense) < 1e-9
    slimdiff.save(slim, tmp_path / "unet")
    loaded = slimdiff.load(tmp_path / "unet")
    pairs = zip(outputs(loaded, planted.inputs), outputs(slim, planted.inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert loaded.get_submodule(SELF).heads == 3


def test_a_pipeline_without_some_heads_is_loaded_by_plain_diffusers(
    planted: Planted, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    from tiny_pipeline import tiny_pipeline

    pipe = tiny_pipeline()
    groups = slimdiff.groups_of(pipe.unet)
    group = next(g for g in groups if g.kind == "value_output")
    value = pipe.unet.get_submodule(group.layer).to_out[0].weight
    with torch.no_grad():
        value[:, : group.width] = 0
        dense = pipe("a", num_inference_steps=2, output_type="np", generator=seeded()).images
    entries = {
        g.name: slimdiff.Entry(g.kind, g.width, g.width, g.heads - 1, g.heads)
        for g in groups
        if g.layer == group.layer
    }
    plan = slimdiff.Plan("UNet2DConditionModel", "slimdiff", entries)
    config = slimdiff.CalibrationConfig(num_inference_steps=2, num_probes=2)
    done = slimdiff.compress(pipe, ["a", "b"], plan=plan, config=config)
    assert done.figures["heads_removed"] == 1 and done.figures["error_on_probes"] < 1e-9
    slimdiff.save_pipeline(pipe, tmp_path / "slim")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "slim", trust_remote_code=True)
    assert type(loaded.unet).__module__ != "slimdiff.slim_denoiser"
    images = [
        p("a", num_inference_steps=2, output_type="np", generator=seeded()).images
        for p in (pipe, loaded)
    ]
    assert (images[0] == images[1]).all() and abs(images[0] - dense).max() < 1e-3


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def removing(planted: Planted, share: float, **how: Any) -> tuple[Job, slimdiff.Plan]:
    budget, allocation = slimdiff.Budget(params=share), Allocation("probed", **how)
    given = planted.unet, planted.statistics, budget, RECIPES["slimdiff"], allocation
    job = Job(*given, ("attention",), planted.curves)
    job.settings = replace(job.removing().settings, removable=frozenset())
    return job, job.plan()


@pytest.mark.parametrize("share", [0.98, 0.96])
def test_the_predicted_error_is_near_that_of_the_rewritten_model(
    planted: Planted, share: float
) -> None:
    job, plan = removing(planted, share)
    assert plan.figures["heads_removed"] and "layers_removed" not in plan.figures
    slim = copy.deepcopy(planted.unet)
    probed = probes_of(slim, planted.statistics)
    given = probed, planted.groups, planted.statistics, plan, planted.curves
    before = measured_error(*given)
    slimdiff.rewrite(slim, planted.statistics, plan, curves=planted.curves)
    after = probed.error({})
    assert after == pytest.approx(before, rel=1e-3) == job.lost(plan)
    assert 0.3 < after / plan.figures["predicted_error"] < 3
    assert costs_.parameters(slim) == plan.figures["params"]


def test_heads_stay_where_removing_them_measures_worse(planted: Planted) -> None:
    def free(curve: ErrorCurve) -> ErrorCurve:
        return replace(curve, by_heads={n: 0.0 * e for n, e in (curve.by_heads or {}).items()})

    told = {name: free(curve) for name, curve in planted.curves.items()}
    given = planted.unet, planted.statistics, slimdiff.Budget(params=0.97)
    plan = slimdiff.allocate(*given, curves=told, layers=("attention",))
    assert "heads_removed" not in plan.figures
    job = Job(*given, RECIPES["slimdiff"], Allocation("probed"), ("attention",), told)
    assert job.removing().plan().figures["heads_removed"] > 2


def test_heads_go_where_narrow_ones_take_as_long_as_wide_ones(planted: Planted) -> None:
    job, _ = removing(planted, 0.98)
    widths = {g.layer: g.width for g in job.groups}
    flat = {layer: {w: 1.0 + 1e-3 * w for w in (4, width)} for layer, width in widths.items()}
    steep = {layer: {w: float(w) for w in (4, width)} for layer, width in widths.items()}
    removed = {}
    for name, times in (("flat", flat), ("steep", steep)):
        found = Profile({}, 1e3, times, dict.fromkeys(times, 0.0))
        saved = sum(max(own.values()) for own in times.values()) / 2
        limit = found.dense_nanoseconds - round(1e9 * saved)
        assert least_nanoseconds(job.groups, job.recipe, job.settings, job.curves, found) < limit
        plan = job.plan(profile=found, limit=limit)
        removed[name] = plan.figures["heads_removed"]
        halves = {n[:-3]: e for n, e in plan.entries.items() if n.endswith(".vo")}
        spent = sum(found.of(n, e.width, e.heads / e.dense_heads) for n, e in halves.items())
        dense = sum(max(own.values()) for own in times.values())
        assert dense - spent >= saved * (1 - 1e-6)
    assert removed["flat"] > removed["steep"]
    assert removed["flat"] >= 2 * len(widths), "half of four heads of every layer"


def test_heads_stay_where_nothing_may_be_removed(planted: Planted) -> None:
    given = planted.unet, planted.statistics, slimdiff.Budget(params=0.9)
    how: dict[str, Any] = {"curves": planted.curves}
    for more in ({"remove_layers": False}, {"allocation": "uniform"}, {"tied": False}):
        plan = slimdiff.allocate(*given, **how, **more)
        assert "heads_removed" not in plan.figures
        assert all(entry.heads == entry.dense_heads for entry in plan.entries.values())


def test_recipes_that_refit_nothing_jointly_keep_all_heads(planted: Planted) -> None:
    paper = measure_curves(planted.unet, planted.statistics, "paper", "probed")
    assert all(curve.by_heads is None for curve in paper.values())
    plan = replace(planted.without(), recipe="paper")
    with pytest.raises(slimdiff.SlimdiffError, match="attn1.vo: 3 of 4 heads stay, but recipe pap"):
        slimdiff.rewrite(copy.deepcopy(planted.unet), planted.statistics, plan)


def test_heads_stay_where_queries_and_keys_do() -> None:
    case = Case("flux")
    group = next(g for g in case.groups if g.kind == "value_output")
    plan = case.plan({group.name: slimdiff.Entry(group.kind, 4, group.width, 1, group.heads)})
    with pytest.raises(slimdiff.SlimdiffError, match="queries and keys of its layer stay"):
        plan.check(case.groups)
    assert halves_of(case.groups) == []


def test_curves_by_heads_are_kept_and_added_where_a_run_was_stopped_before(
    planted: Planted, tmp_path: Path
) -> None:
    model, statistics = planted.unet, planted.statistics
    file = CurveFile(tmp_path, statistics, RECIPES["slimdiff"], probed=True, denoiser=model)
    file.save(planted.curves)
    assert_same(file.load(), planted.curves)
    with safe_open(file.path, framework="pt") as stored:
        header = json.loads(stored.metadata()["slimdiff"])
        names = [name for name in stored.keys() if "heads" not in name]  # noqa: SIM118  (no dict)
        tensors = {name: stored.get_tensor(name) for name in names if ".vo" not in name[:6]}
    header["heads"] = dict.fromkeys(header["heads"])
    save_file(tensors, file.path, metadata={"slimdiff": json.dumps(header)})
    assert all(curve.by_heads is None for curve in file.load().values())
    asked: list[Any] = []
    again = measure_curves(
        model, statistics, folder=tmp_path, progress=lambda *step: asked.append(step)
    )
    assert {stage for stage, _, _ in asked} == {"heads"}, "no gain is measured again"
    assert_same(again, planted.curves)
    assert_same(file.load(), planted.curves)


def assert_same(found: dict[str, ErrorCurve], expected: dict[str, ErrorCurve]) -> None:
    assert found.keys() == expected.keys()
    assert any(curve.by_heads for curve in expected.values())
    for name, curve in expected.items():
        own = found[name]
        assert (own.by_heads is None) == (curve.by_heads is None)
        for heads, errors in (curve.by_heads or {}).items():
            assert torch.equal((own.by_heads or {})[heads], errors)
        assert (own.order is None) == (curve.order is None)
        assert curve.order is None or torch.equal(own.order, curve.order)


@st.composite
def halves(draw: st.DrawFn) -> tuple[Bundle, dict[str, ErrorCurve]]:
    """A bundle of made-up curves, errors falling with the width and rising without heads."""
    heads, width, step = draw(st.integers(2, 6)), draw(st.integers(2, 12)), draw(st.integers(1, 3))
    groups = tuple(
        Group(f"a.{half}", kind, "a", "a", {}, heads, width)  # type: ignore[arg-type]  # a kind
        for half, kind in (("qk", "query_key"), ("vo", "value_output"))
    )
    counts = draw(st.sets(st.integers(1, heads - 1)))

    def falling() -> Tensor:
        drops = draw(st.lists(st.floats(0, 1), min_size=width, max_size=width))
        return torch.tensor([*drops, 0.0], dtype=torch.float64).flip(0).cumsum(0).flip(0)

    curves = {}
    for group in groups:
        by_heads = {n: falling() * draw(st.floats(0, 1)) for n in counts}
        if group.kind == "value_output":
            by_heads = {n: errors + draw(st.floats(0, 1)) for n, errors in by_heads.items()}
        gains = {max(1, width // 2): draw(st.floats(0, 2)), width: draw(st.floats(0, 2))}
        curves[group.name] = ErrorCurve(falling(), gains, None, draw(st.floats(0, 3)), by_heads)
    widths = [0] * draw(st.integers(0, 1)) + [*range(step, width, step), width]
    return Bundle(groups, False, [Size(w, heads) for w in widths]), curves


@settings(deadline=None)
@given(given_=halves(), per_head=st.integers(0, 9))
def test_sizes_rise_in_price_and_lose_no_more_than_all_heads(
    given_: tuple[Bundle, dict[str, ErrorCurve]], per_head: int
) -> None:
    def price(size: Size) -> float:
        return size.inner + per_head * size.heads

    bundle, curves = given_
    found = with_fewer_heads(bundle, curves, price)
    heads, width = bundle.sizes[-1].heads, bundle.sizes[-1].width
    assert all(price(a) <= price(b) for a, b in pairwise(found.sizes))
    assert found.sizes[-1] == bundle.sizes[-1] and found.sizes[0].inner >= 0
    errors = {size: found.error(size, curves) for size in found.sizes}
    least = next(size.width for size in bundle.sizes if size.width)
    every = [Size(w, heads) for w in range(least, width + 1)]
    line = [(price(size), bundle.error(size, curves)) for size in every]
    for size in bundle.sizes:  # all heads lose no more than before at any cost
        cheaper = [error for own, error in errors.items() if price(own) <= price(size)]
        assert min(cheaper) <= bundle.error(size, curves)
        assert size in found.sizes or min(cheaper) < bundle.error(size, curves)
    for place, size in enumerate(found.sizes):
        if size.heads < heads:
            assert errors[size] < WORTH * between(line, price(size))
            assert all(errors[size] < errors[other] for other in found.sizes[:place])
