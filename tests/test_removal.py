"""Layers that go wholly: what they put out, what they cost, and when they are chosen."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import slimdiff
from slimdiff import accounting, layer_timing, profiling
from slimdiff import costs as costs_
from slimdiff.bundles import Allocation
from slimdiff.cli.inspect import measure
from slimdiff.config import RECIPES
from slimdiff.curves import ErrorCurve, probes_of
from slimdiff.fitting import measured_error
from slimdiff.groups import FACTORED, LAYERS, OUTPUTS, Group
from slimdiff.jobs import Job
from slimdiff.removal import constant_of, constant_weights, removable_layers
from slimdiff.shapes import slim_config
from slimdiff.slim_denoiser import (
    CONSTANTS,
    ConstantAttention,
    SlimConfigError,
    become_constant_,
    may_be_constant,
)
from slimdiff.widths import measure_curves
from tiny_models import TINY_MODELS

LIGHT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


class Model:
    """A tiny UNet, its statistics and curves, and one layer of each sort that is to go."""

    def __init__(self, name: str = "sd1") -> None:
        self.unet, self.inputs = TINY_MODELS[name]()
        with slimdiff.record(self.unet) as self.statistics, torch.no_grad():
            self.dense = [self.unet(**call).sample for call in self.inputs]
        self.groups = slimdiff.groups_of(self.unet)
        self.curves = measure_curves(self.unet, self.statistics)
        self.gone = {LIGHT} | {
            next(g for g in self.groups[3:] if g.kind == kind).layer
            for kind in ("feed_forward", "resnet")
        }

    def plan(self) -> slimdiff.Plan:
        entries = {
            g.name: slimdiff.Entry(g.kind, 0, g.width, g.heads, g.heads)
            for g in self.groups
            if g.layer in self.gone
        }
        return slimdiff.Plan("UNet2DConditionModel", "slimdiff", entries)

    def slim(self) -> Any:
        return slimdiff.rewrite(copy.deepcopy(self.unet), self.statistics, self.plan())

    def constants(self) -> dict[str, torch.Tensor]:
        """Parameters of dense size that do the same."""
        swapped: dict[str, torch.Tensor] = {}
        for group in self.groups:
            if group.layer in self.gone:
                swapped |= constant_weights(self.unet, group, self.statistics)
        return swapped


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def outputs(unet: Any, inputs: list[dict[str, Any]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [unet(**call).sample for call in inputs]


def out_layer(unet: nn.Module, group: Group) -> nn.Module:
    return unet.get_submodule(group.paths[OUTPUTS[group.kind]])


def test_the_mean_is_that_of_all_that_a_layer_puts_out(model: Model) -> None:
    """And what the mean leaves is what linear algebra says: E|Wx|^2 - |mean - b|^2."""
    seen: dict[str, list[torch.Tensor]] = {}
    groups = [group for group in model.groups if group.kind in OUTPUTS]
    handles = [
        out_layer(model.unet, group).register_forward_hook(
            lambda _m, _i, y, name=group.name: seen.setdefault(name, []).append(y.double())
        )
        for group in groups
    ]
    outputs(model.unet, model.inputs)
    for handle in handles:
        handle.remove()
    for group in groups:
        y = torch.cat(seen[group.name])
        y_no = y.permute(0, 2, 3, 1).flatten(0, 2) if y.ndim == 4 else y.flatten(0, 1)
        mean = constant_of(model.unet, group, model.statistics)
        torch.testing.assert_close(mean, y_no.mean(0), rtol=1e-6, atol=1e-7)
        if group.kind != "resnet":  # whose borders the autocovariances do not see as they are
            left = float(model.curves[group.name].errors[0])
            bias = out_layer(model.unet, group).bias.detach().double()
            left -= float((mean - bias).square().sum())
            measured = float((y_no - mean).square().sum(-1).mean())
            assert left == pytest.approx(measured, rel=1e-3)


def test_removed_layers_put_out_their_mean(model: Model) -> None:
    slim = model.slim()
    for got, call in zip(outputs(slim, model.inputs), model.inputs, strict=True):
        with torch.no_grad():
            want = torch.func.functional_call(model.unet, model.constants(), (), call).sample
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for path in model.gone:
        layer = slim.get_submodule(path)
        assert type(layer) in CONSTANTS.values()
        assert not any(isinstance(m, nn.Linear | nn.GroupNorm) for m in layer.children()) or (
            isinstance(layer, ResnetBlock2D)
        )


def test_predicted_error_is_that_of_the_rewritten_model(model: Model) -> None:
    for layer in model.gone:
        group = next(g for g in model.groups if g.layer == layer and g.kind in OUTPUTS)
        entries = {n: e for n, e in model.plan().entries.items() if n.startswith(layer)}
        plan = replace(model.plan(), entries=entries)
        slim = copy.deepcopy(model.unet)
        probed = probes_of(slim, model.statistics, held_out=False)
        together = measured_error(probed, model.groups, model.statistics, plan, model.curves)
        slimdiff.rewrite(slim, model.statistics, plan)
        error = model.curves[group.name].at(0)
        assert error == pytest.approx(probed.error({}), rel=1e-3) and error > 0
        assert error == pytest.approx(together, rel=1e-6)


def test_what_is_gone_is_counted_and_told(model: Model) -> None:
    slim = model.slim()
    one_row = model.statistics.probes.batches(1)[0]
    found = costs_.measure(model.unet, model.groups, one_row)
    entries = accounting.entries_of(model.groups, slimdiff.groups_of(slim))
    rows = accounting.account(model.groups, found, entries)["groups"]
    for metric, counted in (
        ("params", sum(p.numel() for p in slim.parameters())),
        ("macs", costs_.measure(slim, [], one_row).macs),
    ):
        saved = sum(row[f"{metric}_dense"] - row[metric] for row in rows)
        assert found.total(metric) - saved == counted
    assert {row["layer"] for row in rows if not row["width"]} == model.gone
    shown = {row.name: row for row in measure(slim, one_row)[0]}
    assert {name for name, row in shown.items() if not row.width} == model.gone
    assert not any(name.startswith(LIGHT) for name in slim.slim_record.maps)


def test_saved_equals_loaded(model: Model, tmp_path: Path) -> None:
    slim = model.slim()
    slimdiff.save(slim, tmp_path / "slim")
    loaded = slimdiff.load(tmp_path / "slim")
    pairs = zip(outputs(slim, model.inputs), outputs(loaded, model.inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    slimdiff.save(loaded, tmp_path / "again")
    assert slimdiff.load(tmp_path / "again").slim_record.plan == slim.slim_record.plan
    again = type(slim).from_config(loaded.config)
    again.load_state_dict(slim.state_dict())


def test_slim_models_compile_cast_and_take_other_processors(model: Model) -> None:
    slim = model.slim()
    expected = outputs(slim, model.inputs[:1])
    compiled = torch.compile(slim, fullgraph=True, backend="eager")
    torch.testing.assert_close(outputs(compiled, model.inputs[:1]), expected)
    slim.set_attention_slice(1)
    torch.testing.assert_close(outputs(slim, model.inputs[:1]), expected, rtol=1e-4, atol=1e-5)
    slim.set_default_attn_processor()
    assert len(slim.attn_processors) == len(model.unet.attn_processors)
    slim.fuse_qkv_projections()
    torch.testing.assert_close(outputs(slim, model.inputs[:1]), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(slim.get_submodule(LIGHT).processor, FusedAttnProcessor2_0)
    half = model.slim().bfloat16()
    call = {k: v.bfloat16() if v.is_floating_point() else v for k, v in model.inputs[0].items()}
    assert half(**call).sample.dtype == torch.bfloat16


@pytest.mark.parametrize("image", [False, True])
def test_residuals_and_factors_of_attention_are_honoured(image: bool) -> None:
    torch.manual_seed(0)
    options = {"residual_connection": True, "rescale_output_factor": 2.0, "bias": True}
    attn = next(kind for kind in CONSTANTS if CONSTANTS[kind] is ConstantAttention)(
        query_dim=16, heads=2, dim_head=8, **options
    ).requires_grad_(False)
    x = torch.randn(2, 16, 3, 5) if image else torch.randn(2, 15, 16)
    attn.to_out[0].weight.zero_()
    expected = attn(x)
    become_constant_(attn, attn.to_out[0].bias)
    torch.testing.assert_close(attn(x, encoder_hidden_states=None), expected)


def test_resnets_that_change_the_size_stay() -> None:
    settings = {"in_channels": 8, "groups": 4, "temb_channels": 8}
    assert may_be_constant(ResnetBlock2D(**settings))
    up = ResnetBlock2D(**settings, up=True)
    assert not may_be_constant(up) and not may_be_constant(ResnetBlock2D(**settings, down=True))
    with pytest.raises(SlimConfigError, match=r"a\.b: ResnetBlock2D cannot be removed"):
        become_constant_(up, torch.zeros(8), "a.b")


def told(model: Model, removed: dict[str, float]) -> dict[str, ErrorCurve]:
    """Curves by which removing a layer costs this much, and everything for the others."""
    return {
        g.name: replace(model.curves[g.name], removed=removed.get(g.layer, 1.0))
        for g in model.groups
    }


def test_layers_go_only_where_that_is_predicted_to_pay(model: Model) -> None:
    def gone(curves: dict[str, ErrorCurve], share: float = 0.9, **how: Any) -> set[str]:
        settings = Allocation(**({"name": "probed"} | how))
        budget, recipe = slimdiff.Budget(params=share), RECIPES["slimdiff"]
        job = Job(model.unet, model.statistics, budget, recipe, settings, None, curves)
        plan = job.removing().plan()
        plan.check(model.groups)
        layers = {g.layer for g in plan.removed(model.groups)}
        assert plan.figures.get("layers_removed", 0) == len(layers)
        return layers

    free = told(model, {LIGHT: 0.0})
    assert gone(free) == {LIGHT}
    assert gone(told(model, {})) == set()
    assert LIGHT not in gone(free, tied=False)
    for name in ("uniform", "entropic"):
        assert gone(free, name=name) == set()
    assert len(gone(free, share=0.12)) > 1


def test_layers_stay_where_removing_them_measures_worse(model: Model) -> None:
    how: dict[str, Any] = {"curves": told(model, {LIGHT: 0.0})}
    given = model.unet, model.statistics
    plan = slimdiff.allocate(*given, slimdiff.Budget(params=0.95), **how)
    assert plan.removed(model.groups) == []
    tight = slimdiff.Budget(params=0.14)
    with pytest.raises(slimdiff.SlimdiffError, match="smallest possible"):
        slimdiff.allocate(*given, tight, **how, remove_layers=False)
    assert slimdiff.allocate(*given, tight, **how).removed(model.groups)


def test_statistics_without_means_keep_all_layers(model: Model) -> None:
    sums = {n: s for n, s in model.statistics.sums.items() if not n.endswith("/output_mean")}
    old = replace(model.statistics, sums=sums)
    assert removable_layers(model.unet, model.groups, old) == frozenset()
    curves = measure_curves(model.unet, old, layers=["attention"])
    assert all(curve.removed is None for curve in curves.values())
    with pytest.raises(slimdiff.SlimdiffError, match="output_mean.*not recorded; calibrate again"):
        slimdiff.rewrite(copy.deepcopy(model.unet), old, model.plan())


def test_halves_of_an_attention_layer_go_together(model: Model) -> None:
    entries = {n: e for n, e in model.plan().entries.items() if not n.endswith(".qk")}
    with pytest.raises(slimdiff.SlimdiffError, match="other half is removed"):
        replace(model.plan(), entries=entries).check(model.groups)
    kept = {f"{LIGHT}.qk": slimdiff.Entry("query_key", 4, 16, 2, 2)}
    plan = replace(model.plan(), entries=entries | kept)
    with pytest.raises(slimdiff.SlimdiffError, match="other half is removed"):
        plan.check(model.groups)


def test_a_removed_layer_is_timed_too(model: Model) -> None:
    found = profiling.profile(model.unet, model.groups, model.inputs[0])
    for layer in removable_layers(model.unet, model.groups, model.statistics):
        times = found.layers[layer]
        assert 0 in times and times[0] < times[max(times)], layer
    narrow = layer_timing.narrowed(
        model.unet, slim_config(model.unet, model.groups, model.plan().entries)
    )
    assert {n: p.shape for n, p in narrow.named_parameters()} == {
        n: p.shape for n, p in model.slim().named_parameters()
    }


def test_every_sort_of_layer_can_go(model: Model) -> None:
    kinds = {LAYERS[g.kind] for g in model.groups if g.layer in model.gone}
    assert kinds == set(LAYERS.values()) - set(FACTORED)
    assert removable_layers(model.unet, model.groups, model.statistics) == {
        group.layer for group in model.groups if group.kind not in FACTORED
    }
