"""What every family must pass, on tiny random models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimdiff
from slimdiff import costs as costs_
from slimdiff.config import RECIPES
from slimdiff.curves import effective_weights
from slimdiff.probing import Probed, tensors_of
from slimdiff.recipes import decompose_group
from tiny_models import TINY_MODELS, Inputs

NOT_OF_ITS_CONFIG = {"plain_gelu"}
"""Models whose layers were exchanged by hand, so that no config can build them again."""


class Case:
    """A tiny model with its inputs, dense outputs and statistics."""

    def __init__(self, name: str) -> None:
        self.model, self.inputs = TINY_MODELS[name]()
        with slimdiff.record(self.model) as self.statistics:
            self.dense = outputs(self.model, self.inputs)
        self.groups = slimdiff.groups_of(self.model)

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def entry(self, group: Any, width: int) -> slimdiff.Entry:
        return slimdiff.Entry(group.kind, width, group.width, group.heads, group.heads)

    def plan(self, entries: dict[str, slimdiff.Entry], recipe: str = "slimdiff") -> slimdiff.Plan:
        return slimdiff.Plan(type(self.model).__name__, recipe, entries)

    def error(self, slim: nn.Module) -> float:
        got = outputs(slim, self.inputs)
        squared = sum(float((y - d).square().sum()) for y, d in zip(got, self.dense, strict=True))
        return squared / sum(float(d.square().sum()) for d in self.dense)


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [output_of(model(**call, return_dict=False)) for call in inputs]


def output_of(output: Any) -> Tensor:
    """What a denoiser puts out as one tensor."""
    tensors = tensors_of(output)
    return tensors[0] if len(tensors) == 1 else torch.cat([t.flatten() for t in tensors])


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


CASES = pytest.mark.parametrize("case", sorted(TINY_MODELS), indirect=True)


@CASES
def test_every_group_names_layers_and_sees_its_inputs(case: Case) -> None:
    names = {
        "query_key": "q k k_centred",
        "value_output": "v z",
        "feed_forward": "h",
        "resnet": "lags",
        "modulation": "x",
        "projection": "y",
    }
    assert {"value_output", "feed_forward"} <= {group.kind for group in case.groups} <= set(names)
    assert_shared_inputs_are_equal(case)
    for group in case.groups:
        for path in group.paths.values():
            layer = case.model.get_submodule(path)
            convolves = group.kind in ("resnet", "projection") or "depth" in group.paths
            assert isinstance(layer, nn.Linear) or convolves
        for what in names[group.kind].split():
            assert case.statistics.weights[f"{group.source or group.layer}/{what}"] > 0
    assert case.statistics.calls == len(case.inputs)


def assert_shared_inputs_are_equal(case: Case) -> None:
    """Groups that share statistics really get the same input."""
    inputs: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert torch.equal(inputs.setdefault("first", args[0]), args[0])

    shared = [case.model.get_submodule(group.layer) for group in case.groups if group.source]
    handles = [layer.register_forward_pre_hook(hook) for layer in shared]
    outputs(case.model, case.inputs[:1])
    for handle in handles:
        handle.remove()


@CASES
def test_recording_changes_nothing(case: Case) -> None:
    hooks = [
        hook
        for module in case.model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not hook.__module__.startswith("transformers.")  # it keeps those that capture outputs
    ]
    assert hooks == []
    for again, before in zip(outputs(case.model, case.inputs), case.dense, strict=True):
        assert torch.equal(again, before)


@CASES
def test_full_widths_change_nothing(case: Case) -> None:
    slim = case.copy()
    entries = {group.name: case.entry(group, group.width) for group in case.groups}
    slimdiff.rewrite(slim, case.statistics, case.plan(entries))
    for got, dense in zip(outputs(slim, case.inputs), case.dense, strict=True):
        torch.testing.assert_close(got, dense, rtol=1e-5, atol=1e-6)


@CASES
def test_slim_group_behaves_as_its_effective_dense_weight(case: Case) -> None:
    """One layer of each kind at half width: the reshaped model, with its scale folded in, gives
    what the dense-size weights that gains are measured with give."""
    first = {group.kind: group.layer for group in reversed(case.groups)}
    chosen = [g for g in case.groups if g.layer in first.values()]
    entries = {g.name: case.entry(g, g.width // 2) for g in chosen}
    recipe = RECIPES["slimdiff"]
    swapped: dict[str, Tensor] = {}
    for group in chosen:
        maps = decompose_group(case.model, group, case.statistics, recipe).maps(group.width // 2)
        swapped |= effective_weights(case.model, group, maps)
    slim = slimdiff.rewrite(case.copy(), case.statistics, case.plan(entries))
    with torch.no_grad():
        for call, got in zip(case.inputs, outputs(slim, case.inputs), strict=True):
            call = call | {"return_dict": False}
            want = output_of(torch.func.functional_call(case.model, swapped, (), call))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=5e-5)


@CASES
def test_skipping_finished_stages_changes_no_gain(case: Case) -> None:
    """The error with stages kept from the dense run equals that of a full run."""
    probed = Probed(case.model, case.statistics.probes)
    assert probed.error({}) == 0
    errors = []
    for group in [g for g in case.groups if g.kind in ("feed_forward", "resnet")][1::2]:
        decomposition = decompose_group(case.model, group, case.statistics, RECIPES["slimdiff"])
        weights = effective_weights(case.model, group, decomposition.maps(group.width // 2))
        quick = probed.error(weights)
        full = copy.deepcopy(case.model)
        full.load_state_dict(full.state_dict() | weights)
        probed.denoiser, kept = full, probed.denoiser
        assert quick == pytest.approx(probed.error({}), rel=1e-4)
        probed.denoiser = kept
        errors.append(quick)
    assert max(errors) > 0


@CASES
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_budget_is_met_and_counted_right(case: Case, recipe: str) -> None:
    slim = case.copy()
    dense = costs_.measure(slim, case.groups, case.inputs[0])
    groups = slimdiff.groups_of(slim, RECIPES[recipe].layers)
    if RECIPES[recipe].heads:  # no head goes where queries and keys stay
        queries = {g.layer for g in groups if g.kind == "query_key"}
        groups = [g for g in groups if g.kind != "value_output" or g.layer in queries]
        groups = [g for g in groups if not g.fixed_heads]
    shrinkable = sum(dense.groups[g.name].of("params", g.inner) for g in groups)
    budget = slimdiff.Budget(remove=shrinkable // 2)
    plan = slimdiff.allocate(slim, case.statistics, budget, recipe=recipe)
    slimdiff.rewrite(slim, case.statistics, plan)
    assert costs_.parameters(slim) == plan.figures["params"] <= dense.params - shrinkable // 2
    probe = case.statistics.probes.batches(1)[0]
    slim_costs = costs_.measure(slim, slimdiff.groups_of(slim), probe)
    assert slim_costs.macs == plan.figures["macs"] < plan.figures["macs_dense"]
    assert all(torch.isfinite(y).all() for y in outputs(slim, case.inputs))


@CASES
def test_predicted_error_holds_at_half_of_everything(case: Case) -> None:
    probed = Probed(case.copy(), case.statistics.probes)
    dense = costs_.measure(case.model, case.groups, case.inputs[0])
    shrinkable = sum(dense.groups[g.name].of("params", g.inner) for g in case.groups)
    budget = slimdiff.Budget(remove=shrinkable // 2)
    plan = slimdiff.allocate(case.model, case.statistics, budget)
    slimdiff.rewrite(probed.denoiser, case.statistics, plan)
    assert 0.4 < probed.error({}) / plan.figures["predicted_error"] < 2.5


@CASES
def test_probed_allocation_loses_less_than_the_others(case: Case) -> None:
    budget = slimdiff.Budget(params=0.93)
    errors = {}
    for recipe, allocation in (("slimdiff", "probed"), ("paper", "uniform"), ("magnitude", None)):
        plan = slimdiff.allocate(
            case.model,
            case.statistics,
            budget,
            recipe=recipe,
            allocation=allocation,
            layers=("attention", "feed_forward"),
        )
        slim = slimdiff.rewrite(case.copy(), case.statistics, plan)
        errors[recipe] = case.error(slim)
    assert errors["slimdiff"] < min(errors["paper"], errors["magnitude"])


@CASES
def test_untied_widths_run(case: Case) -> None:
    """Text encoders stay tied: their attention takes one width."""
    only = {"tied": False, "layers": ("attention",)}
    plan = slimdiff.allocate(case.model, case.statistics, slimdiff.Budget(macs=0.97), **only)
    widths = {group.layer: group.width for group in case.groups}
    for name, entry in plan.entries.items():
        if name.endswith(".qk"):
            widths[name.removesuffix(".qk")] = entry.width
    values = {n.removesuffix(".vo"): e.width for n, e in plan.entries.items() if n.endswith(".vo")}
    text = all(group.tied for group in case.groups if group.kind == "value_output")
    assert any(width != widths[layer] for layer, width in values.items()) != text
    slim = slimdiff.rewrite(case.copy(), case.statistics, plan)
    assert case.error(slim) < 0.1


@CASES
def test_slim_models_are_one_graph_for_the_compiler(case: Case) -> None:
    slim = case.copy()
    budget = slimdiff.Budget(params=0.93)
    plan = slimdiff.allocate(slim, case.statistics, budget, allocation="uniform")
    slimdiff.rewrite(slim, case.statistics, plan)
    torch.compiler.reset()  # else the graphs of other models count as recompilations of this one
    compiled = torch.compile(slim, fullgraph=True, backend="eager")
    got, expected = outputs(compiled, case.inputs[:1]), outputs(slim, case.inputs[:1])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@CASES
def test_a_plan_of_the_dense_model_does_not_fit_the_slim_one(case: Case) -> None:
    plan = slimdiff.allocate(case.model, case.statistics, slimdiff.Budget(params=0.95))
    slim = slimdiff.rewrite(case.copy(), case.statistics, plan)
    with pytest.raises(slimdiff.SlimdiffError, match="slimmed already|does not have"):
        slimdiff.rewrite(slim, case.statistics, plan)


@pytest.mark.parametrize("case", sorted(set(TINY_MODELS) - NOT_OF_ITS_CONFIG), indirect=True)
def test_saved_equals_loaded(case: Case, tmp_path: Any) -> None:
    plan = slimdiff.allocate(case.model, case.statistics, slimdiff.Budget(params=0.9))
    slim = slimdiff.rewrite(case.copy(), case.statistics, plan)
    slimdiff.save(slim, tmp_path / "slim")
    loaded = slimdiff.load(tmp_path / "slim")
    for a, b in zip(outputs(slim, case.inputs), outputs(loaded, case.inputs), strict=True):
        assert torch.equal(a, b)


@CASES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_stay_in_their_dtype(case: Case, dtype: torch.dtype) -> None:
    model = case.copy().to(dtype)
    calls = [_cast(call, dtype) for call in case.inputs]
    with slimdiff.record(model) as statistics:
        for call in calls:
            model(**call)
    plan = slimdiff.allocate(model, statistics, slimdiff.Budget(params=0.9))
    slim = slimdiff.rewrite(model, statistics, plan)
    assert {p.dtype for p in slim.parameters()} == {dtype}
    with torch.no_grad():
        assert all(torch.isfinite(y).all() for y in outputs(slim, calls))


def _cast(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: _cast(value, dtype)
        if isinstance(value, dict)
        else value.to(dtype)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in call.items()
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_singular_statistics_give_finite_weights_and_a_warning(
    caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    """One call with few tokens, a dead hidden unit and two copies of another."""
    model, inputs = TINY_MODELS["sd1"]()
    group = next(g for g in slimdiff.groups_of(model) if g.kind == "feed_forward")
    up = model.get_submodule(group.paths["up"])
    with torch.no_grad():
        for rows in (slice(0, 1), slice(group.width, group.width + 1)):
            up.weight[rows], up.bias[rows] = 0, 0
        for start in (0, group.width):
            up.weight[start + 2] = up.weight[start + 1]
            up.bias[start + 2] = up.bias[start + 1]
    with slimdiff.record(model, dtype=dtype) as statistics:
        model(**inputs[0])
    with caplog.at_level("WARNING"):
        plan = slimdiff.allocate(
            model, statistics, slimdiff.Budget(params=0.9), layers=("attention", "feed_forward")
        )
    assert "singular" in caplog.text and group.block in caplog.text
    slim = slimdiff.rewrite(model, statistics, plan)
    assert all(p.isfinite().all() for p in slim.parameters())
    assert plan.entries[group.name].width < group.width
