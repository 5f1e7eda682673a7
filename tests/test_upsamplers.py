"""Fused upsamplers: the same output, a quarter of the multiplications, and who fuses them when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import slimdiff
from slimdiff import costs as costs_
from slimdiff import profiling, slim_denoiser
from slimdiff.profile import Profile
from slimdiff.slim_denoiser import (
    FactoredDoublingConv2d,
    FusedUpsample2D,
    SlimConfigError,
    may_be_fused,
    reshape_,
)
from slimdiff.upsamplers import fusable
from test_contract import Case, outputs

UPSAMPLER = "up_blocks.0.upsamplers.0"
CONV = f"{UPSAMPLER}.conv"

sides = st.integers(1, 6)


def upsampler(inputs: int = 6, outputs: int = 5, **more: Any) -> Upsample2D:
    torch.manual_seed(0)
    return Upsample2D(inputs, use_conv=True, out_channels=outputs, **more).double()


def fused(module: nn.Module, rank: int | None = None) -> FusedUpsample2D:
    slim: dict[str, Any] = {"version": 1, "linears": {}, "attentions": {}}
    slim |= {"fused_upsamplers": {"": 2}, "factored": {"conv": rank} if rank else {}}
    found = reshape_(module, slim)
    assert isinstance(found, FusedUpsample2D)
    return found


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), sides, sides),
    bias=st.booleans(),
    last=st.booleans(),
    at_once=st.sampled_from([1, 200, 2**25]),
)
def test_is_doubling_and_then_convolving(sizes, bias: bool, last: bool, at_once: int) -> None:
    number, inputs, channels, height, width = sizes
    module = Upsample2D(inputs, use_conv=True, out_channels=channels, bias=bias).double()
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(number, inputs, height, width, dtype=torch.float64)
    x = x.contiguous(memory_format=layout)
    want = module(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slim_denoiser, "DOUBLED_AT_ONCE", at_once)
        got = fused(module)(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert x.is_contiguous() or got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_about_as_much(dtype: torch.dtype) -> None:
    module, x = upsampler(64, 32), torch.randn(2, 64, 8, 8, dtype=torch.float64)
    want = module(x)
    plain = (module.to(dtype)(x.to(dtype)).double() - want).norm()
    assert (fused(module)(x.to(dtype)).double() - want).norm() < 2 * plain


def test_gradients_are_the_same() -> None:
    module, x = upsampler(), torch.randn(2, 6, 4, 3, dtype=torch.float64, requires_grad=True)
    parameters = [x, *module.parameters()]
    want = torch.autograd.grad(module(x).square().sum(), parameters)
    got = torch.autograd.grad(fused(module)(x).square().sum(), parameters)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_factored_one_is_the_product_of_its_factors() -> None:
    module, x = fused(upsampler(), rank=3), torch.randn(2, 6, 4, 3, dtype=torch.float64)
    assert isinstance(module.conv, FactoredDoublingConv2d)
    weight = torch.einsum("or,rihw->oihw", module.conv.weight[..., 0, 0], module.conv.projection)
    doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
    torch.testing.assert_close(module(x), F.conv2d(doubled, weight, module.conv.bias, padding=1))
    assert reshape_(module, {"version": 1, "linears": {}, "attentions": {}}) is module
    assert isinstance(fused(module, rank=3).conv, FactoredDoublingConv2d)


def test_compiles_as_one_graph() -> None:
    module, x = fused(upsampler()), torch.randn(2, 6, 4, 3, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


class Around(nn.Module):
    """What an adapter does to a convolution."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.base_layer = conv

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base_layer(x)


def test_other_sizes_and_adapters_go_the_long_way() -> None:
    module, x = upsampler(), torch.randn(2, 6, 4, 3, dtype=torch.float64)
    odd, want = module(x, (7, 5)), module(x)
    ours = fused(module)
    assert torch.equal(ours(x, (7, 5)), odd)
    torch.testing.assert_close(ours(x, (8, 6)), want)
    ours.conv = Around(ours.conv)
    assert torch.equal(ours(x), 2 * want)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(3, 3, 3),
        Upsample2D(4),
        Upsample2D(4, use_conv=True, name="Conv2d_0"),
        Upsample2D(4, use_conv_transpose=True),
        Upsample2D(4, use_conv=True, kernel_size=5, padding=2),
        Upsample2D(4, use_conv=True, interpolate=False),
        Upsample2D(4, use_conv=True, norm_type="ln_norm"),
    ],
)
def test_others_are_not_fused(other: nn.Module) -> None:
    assert not may_be_fused(other)
    with pytest.raises(SlimConfigError, match="no such Upsample2D|no nearest-neighbour"):
        fused(other)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case("sd1")


def plan_of(case: Case, **budget: float) -> slimdiff.Plan:
    return slimdiff.allocate(
        case.model, case.statistics, slimdiff.Budget(**budget), allocation="uniform"
    )


def test_a_budget_that_fusing_meets_loses_nothing(case: Case) -> None:
    assert fusable(case.model, case.groups) == (UPSAMPLER,)
    call = case.inputs[0]
    before = costs_.measure(case.model, case.groups, call, [UPSAMPLER])
    share = (before.macs - before.spared("macs")) / before.macs
    plan = plan_of(case, macs=share + 1e-6)
    assert plan.fused == [UPSAMPLER] and not plan.changed(case.groups)
    slim = slimdiff.rewrite(case.copy(), case.statistics, plan)
    assert isinstance(slim.get_submodule(UPSAMPLER), FusedUpsample2D)
    assert costs_.measure(slim, [], call).macs == before.macs - before.spared("macs")
    assert costs_.parameters(slim) == before.params
    for got, want in zip(outputs(slim, case.inputs), case.dense, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("macs", [0.9, 0.6])
def test_macs_are_counted_right(case: Case, macs: float) -> None:
    plan = plan_of(case, macs=macs)
    slim = slimdiff.rewrite(case.copy(), case.statistics, plan)
    row = case.statistics.probes.batches(1)[0]
    assert costs_.measure(slim, [], row).macs == plan.figures["macs"]
    assert plan.figures["macs"] <= macs * plan.figures["macs_dense"]
    narrow = plan.entries[CONV].width < plan.entries[CONV].dense_width
    assert isinstance(slim.get_submodule(CONV), FactoredDoublingConv2d) == narrow
    again = costs_.measure(slim, slimdiff.groups_of(slim), row)
    conv = next(g for g in slimdiff.groups_of(slim) if g.name == CONV)
    assert again.groups[CONV].spared == 0 and not fusable(slim, slimdiff.groups_of(slim))
    planned = costs_.measure(case.model, case.groups, row, [UPSAMPLER]).groups[CONV]
    assert again.groups[CONV].of("macs", conv.inner) == planned.of("macs", conv.inner)


def test_a_budget_in_parameters_leaves_them_as_they_are(case: Case) -> None:
    plan = plan_of(case, params=0.7)
    slim = slimdiff.rewrite(case.copy(), case.statistics, plan)
    assert not plan.fused and type(slim.get_submodule(UPSAMPLER)) is Upsample2D


def test_stays_fused_in_a_folder_and_when_slimmed_again(case: Case, tmp_path: Path) -> None:
    plan = plan_of(case, macs=0.8)
    slim = slimdiff.rewrite(case.copy(), case.statistics, plan)
    slimdiff.save(slim, tmp_path / "slim")
    loaded = slimdiff.load(tmp_path / "slim")
    for got, want in zip(outputs(loaded, case.inputs), outputs(slim, case.inputs), strict=True):
        assert torch.equal(got, want)
    with slimdiff.record(loaded) as statistics, torch.no_grad():
        for call in case.inputs:
            loaded(**call)
    second = slimdiff.allocate(
        loaded, statistics, slimdiff.Budget(params=0.9), allocation="uniform"
    )
    assert not second.fused
    twice = slimdiff.rewrite(loaded, statistics, second)
    assert twice.slim_record.plan.fused == [UPSAMPLER]
    assert isinstance(twice.get_submodule(UPSAMPLER), FusedUpsample2D)
    row = statistics.probes.batches(1)[0]
    assert costs_.measure(twice, [], row).macs == second.figures["macs"]
    slimdiff.save(twice, tmp_path / "twice")
    assert isinstance(slimdiff.load(tmp_path / "twice").get_submodule(UPSAMPLER), FusedUpsample2D)


def test_latents_of_an_odd_size(case: Case) -> None:
    slim = slimdiff.rewrite(case.copy(), case.statistics, plan_of(case, macs=0.97))
    call = case.inputs[0] | {"sample": torch.randn(2, 4, 9, 7)}
    with torch.no_grad():
        want = case.model(**call).sample
        got = slim(**call).sample
    assert (got - want).norm() < 0.1 * want.norm()


def test_a_time_decides_by_what_was_measured(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    call = case.statistics.probes.batches(2)[0]
    found = profiling.profile(case.model, case.groups, call)
    assert set(found.fused) <= {UPSAMPLER} and all(s > 0 for s in found.fused.values())
    assert found.remaining_nanoseconds <= found.dense_nanoseconds
    times = {layer: dict.fromkeys(widths, 0.1) for layer, widths in found.layers.items()}
    for spared in ({}, {UPSAMPLER: 0.2}):
        profile = Profile(found.machine, 100.0, times, fused=spared)
        monkeypatch.setattr("slimdiff.jobs.profile", lambda *_, profile=profile, **__: profile)
        monkeypatch.setattr("slimdiff.fitting.TOLERANCE", 100.0)  # whatever is measured will do
        plan = plan_of(case, speedup=1.001)
        assert plan.fused == list(spared)


def test_a_kept_profile_fuses_only_what_may_change(case: Case, tmp_path: Path) -> None:
    call = case.statistics.probes.batches(2)[0]
    known = profiling.profile(case.model, case.groups, call, folder=tmp_path)
    attention = slimdiff.groups_of(case.model, ["attention"])
    fewer = profiling.profile(case.model, attention, call, folder=tmp_path)
    assert fewer.layers == known.layers and not fewer.fused


def test_a_plan_for_another_model_is_refused(case: Case) -> None:
    plan = slimdiff.Plan("UNet2DConditionModel", "slimdiff", {}, fused=["nowhere"])
    with pytest.raises(slimdiff.SlimdiffError, match=f"fuses nowhere.*{UPSAMPLER}"):
        slimdiff.rewrite(case.copy(), case.statistics, plan)
    assert slimdiff.Plan.from_json(plan.to_json()) == plan
