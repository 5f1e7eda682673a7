"""A slim model slimmed again: one plan and one set of maps from the dense model, in one folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimdiff
from slimdiff import costs as costs_
from slimdiff.composition import composed_maps
from slimdiff.groups import FACTORED, LAYERS, Group, stem
from slimdiff.profiling import profile
from slimdiff.removal import removable_layers
from test_contract import CASES, NOT_OF_ITS_CONFIG, Case, case, outputs
from test_contract_plain import assert_plain_diffusers_gives
from tiny_models import TINY_MODELS

__all__ = ["case"]


def recorded(model: nn.Module, inputs: list[dict[str, Any]]) -> slimdiff.Statistics:
    with slimdiff.record(model) as statistics:
        outputs(model, inputs)
    return statistics


def again(model: nn.Module, inputs: list[dict[str, Any]], **how: Any) -> slimdiff.Plan:
    """A third of what can shrink in a model, dense or slim, goes; returns the plan of that."""
    statistics, groups = recorded(model, inputs), slimdiff.groups_of(model, how.get("layers"))
    before = costs_.measure(model, groups, inputs[0])
    shrinkable = sum(before.groups[group.name].of("params", group.inner) for group in groups)
    budget = slimdiff.Budget(remove=shrinkable // 3)
    plan = slimdiff.allocate(model, statistics, budget, **how)
    slimdiff.rewrite(model, statistics, plan)
    assert costs_.parameters(model) == plan.figures["params"] <= budget.limit(before.params)
    return plan


def twice(case: Case, **how: Any) -> tuple[nn.Module, slimdiff.Plan, slimdiff.Plan]:
    model = case.copy()
    return model, again(model, case.inputs, **how), again(model, case.inputs, **how)


@CASES
def test_slimmed_twice(case: Case, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    slim, first, second = twice(case)
    dense = {group.name: group for group in case.groups}
    record: Any = slim.slim_record
    assert first.figures["params"] == second.figures["params_dense"]
    assert record.plan.denoiser == type(case.model).__name__ == second.denoiser
    assert record.plan.figures["params_dense"] == costs_.parameters(case.model)
    now = {group.name: group for group in slimdiff.groups_of(slim)}
    for name, entry in record.plan.entries.items():
        group = dense[name]
        assert (entry.dense_width, entry.dense_heads) == (group.width, group.heads)
        if entry.width:
            assert (entry.width, entry.heads) == (now[name].width, now[name].heads)
            assert now[name].dense_width == group.width
        else:
            assert name not in now
    assert_maps_lead_to_the_weights(case, slim)
    assert all(torch.isfinite(y).all() for y in outputs(slim, case.inputs))
    if request.node.callspec.params["case"] not in NOT_OF_ITS_CONFIG:
        assert_the_folder_gives_it_back(slim, case, tmp_path)


def assert_the_folder_gives_it_back(slim: nn.Module, case: Case, folder: Path) -> None:
    slimdiff.save(slim, folder / "slim")
    loaded = slimdiff.load(folder / "slim")
    for a, b in zip(outputs(slim, case.inputs), outputs(loaded, case.inputs), strict=True):
        assert torch.equal(a, b)
    record: Any = slim.slim_record
    assert loaded.slim_record.plan == record.plan
    assert loaded.slim_record.maps.keys() == record.maps.keys()
    slimdiff.save(loaded, folder / "again")
    again(slimdiff.load(folder / "again"), case.inputs, allocation="uniform")


def assert_maps_lead_to_the_weights(case: Case, slim: nn.Module) -> None:
    """Composed maps applied to dense weights give the weights of the slim model."""
    record: Any = slim.slim_record
    for group in slimdiff.groups_of(slim):
        roles = {
            path.rpartition("/")[2]: value
            for path, value in record.maps.items()
            if path.rpartition("/")[0] == group.name
        }
        entry = record.plan.entries.get(group.name)
        narrow = entry is not None and not entry.is_full
        assert bool(roles) == (narrow and group.kind not in FACTORED)
        original = next(g for g in case.groups if g.name == group.name)
        for role in group.paths if roles else ():
            want, got = (weight(case.model, original, role), weight(slim, group, role))
            found = mapped(stem(role), want, roles, original)
            if found is None:
                continue
            if stem(role) == "q":  # the softmax scale is folded in
                scale = float((got * found).sum() / found.square().sum())
                found = scale * found
                assert scale == pytest.approx(folded(case.model, original, group), rel=1e-4)
            torch.testing.assert_close(got, found, rtol=1e-4, atol=1e-5)


def weight(model: nn.Module, group: Group, role: str) -> Tensor:
    whole = model.get_submodule(group.paths[role]).weight.detach().double()
    return whole[:, group.input_columns(role)] if role in group.columns else whole


def folded(dense: nn.Module, group: Group, slim: Group) -> float:
    if group.unscaled or group.width == slim.width:
        return 1.0
    scale = getattr(dense.get_submodule(group.layer), "scale", group.width**-0.5)
    return float(scale * slim.width**0.5)


def mapped(role: str, w: Tensor, maps: dict[str, Tensor], group: Group) -> Tensor | None:
    """T^T W or W T, with the whole T written out; None for a kernel that was solved anew."""
    if role == "conv2":
        return None
    if group.kind == "resnet":
        rows = maps["channels"]
        return w[torch.cat([rows, rows + group.width]) if len(w) == 2 * group.width else rows]
    if group.kind == "feed_forward":
        units = maps["units"]
        if role != "down":
            return w[
                torch.cat([units, units + group.width]) if len(w) == 2 * group.width else units
            ]
        whole = torch.zeros(group.width, len(units), dtype=torch.float64)
        rest = [unit for unit in range(group.width) if unit not in set(units.tolist())]
        whole[units], whole[rest] = torch.eye(len(units), dtype=torch.float64), maps["coupling"]
        return torch.einsum("of...,fs->os...", w, whole)
    heads = maps.get("heads", torch.arange(group.heads))
    if role == "out" and "out" in maps:
        return w @ maps["out"]
    if role == "out":
        return w.unflatten(1, (group.heads, -1))[:, heads].flatten(1)
    kept = w.unflatten(0, (group.heads, -1))[heads]
    return (maps[role].mT @ kept if role in maps else kept).flatten(0, 1)


@pytest.mark.parametrize("first", ["slimdiff", "paper", "magnitude"])
@pytest.mark.parametrize("second", ["slimdiff", "magnitude"])
@pytest.mark.parametrize("name", ["sd2", "clip_text"])
def test_recipes_follow_each_other(name: str, first: str, second: str) -> None:
    case = Case(name)
    slim = case.copy()
    how = {"allocation": "uniform", "layers": ("attention", "feed_forward")}
    for recipe in (first, second):
        again(slim, case.inputs, recipe=recipe, **how)
    assert_maps_lead_to_the_weights(case, slim)


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux", "wan"])
def test_widths_that_differ_may_be_slimmed_and_tied_again(name: str, tmp_path: Path) -> None:
    case = Case(name)
    slim = case.copy()
    halves = {"query_key": 12, "value_output": 8}
    for query, value in ((12, 8), (8, 4), (4, 4)):
        widths = {"query_key": query, "value_output": value}
        statistics = recorded(slim, case.inputs)
        entries = {
            g.name: case.entry(g, min(g.width, widths[g.kind]))
            for g in slimdiff.groups_of(slim)
            if g.kind in halves
        }
        slimdiff.rewrite(slim, statistics, case.plan(entries))
        slimdiff.save(slim, tmp_path / "slim")
        loaded = slimdiff.load(tmp_path / "slim")
        for a, b in zip(outputs(slim, case.inputs), outputs(loaded, case.inputs), strict=True):
            assert torch.equal(a, b)
        plan = slimdiff.allocate(
            slim, recorded(slim, case.inputs), slimdiff.Budget(params=0.97), allocation="uniform"
        )
        slimdiff.rewrite(copy.deepcopy(slim), recorded(slim, case.inputs), plan)
    assert_maps_lead_to_the_weights(case, slim)


@pytest.mark.parametrize("name", ["sd1", "pixart", "sd3"])
def test_layers_go_in_either_round(name: str, tmp_path: Path) -> None:
    case = Case(name)
    slim, gone = case.copy(), set[str]()
    for _ in range(2):
        statistics, groups = recorded(slim, case.inputs), slimdiff.groups_of(slim)
        may_go = removable_layers(slim, groups, statistics)
        chosen = set({LAYERS[g.kind]: g.layer for g in groups if g.layer in may_go}.values())
        gone |= chosen
        entries = {g.name: case.entry(g, 0 if g.layer in chosen else g.width // 2) for g in groups}
        kept = {g.name: e for g in groups if (e := entries[g.name]).width % g.step == 0}
        slimdiff.rewrite(slim, statistics, case.plan(kept))
    record: Any = slim.slim_record
    removed = {g.layer for g in case.groups if not record.plan.entries[g.name].width}
    assert record.plan.figures["layers_removed"] == len(gone)
    assert removed == gone and set(slim.config["slimdiff"]["constants"]) == gone
    assert not [p for p in record.maps if p.rpartition("/")[0].startswith(tuple(gone))]
    assert_maps_lead_to_the_weights(case, slim)
    slimdiff.save(slim, tmp_path / "slim")
    loaded = slimdiff.load(tmp_path / "slim")
    for a, b in zip(outputs(slim, case.inputs), outputs(loaded, case.inputs), strict=True):
        assert torch.equal(a, b)


def test_fewer_and_narrower_heads_twice(tmp_path: Path) -> None:
    case = Case("sd2")
    slim = case.copy()
    for heads, width in ((3, 12), (2, 8)):
        statistics = recorded(slim, case.inputs)
        entries = {
            g.name: slimdiff.Entry(g.kind, width, g.width, heads, g.heads)
            for g in slimdiff.groups_of(slim)
            if g.heads > 2
        }
        slimdiff.rewrite(slim, statistics, case.plan(entries))
    record: Any = slim.slim_record
    assert {(e.heads, e.dense_heads, e.width) for e in record.plan.entries.values()} == {(2, 4, 8)}
    assert_maps_lead_to_the_weights(case, slim)
    slimdiff.save(slim, tmp_path / "slim")
    loaded = slimdiff.load(tmp_path / "slim")
    for a, b in zip(outputs(slim, case.inputs), outputs(loaded, case.inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("first", ["both", "heads", "widths"])
@pytest.mark.parametrize("second", ["both", "heads", "widths"])
def test_fewer_heads_of_another_width_are_composed(first: str, second: str) -> None:
    """Maps that choose heads, mix the channels of those that stay, or both, after one another."""
    torch.manual_seed(0)
    heads, width = 4, 6
    dense = torch.randn(heads, width, 5, dtype=torch.float64)
    out = torch.randn(3, heads * width, dtype=torch.float64)
    one = random_maps(first, heads, width, 3, 5)
    kept, narrow = applied(dense, out, one)[0].shape[:2]
    two = random_maps(second, kept, narrow, 2, 4)
    entry = slimdiff.Entry("value_output", narrow, width, kept, heads)
    found = applied(dense, out, composed_maps(one, two, entry))
    for got, want in zip(found, applied(*applied(dense, out, one), two), strict=True):
        torch.testing.assert_close(got, want)


def random_maps(sort: str, heads: int, width: int, kept: int, narrow: int) -> dict[str, Tensor]:
    kept = heads if sort == "widths" else kept
    maps = {
        "heads": torch.randperm(heads)[:kept].sort().values,
        "v": torch.randn(kept, width, narrow, dtype=torch.float64),
        "out": torch.randn(heads * width, kept * narrow, dtype=torch.float64),
    }
    names = {"both": ("heads", "v", "out"), "heads": ("heads",), "widths": ("v", "out")}
    return {name: maps[name] for name in names[sort]}


def applied(w_hei: Tensor, out: Tensor, maps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    heads, width, _ = w_hei.shape
    kept = w_hei[maps["heads"]] if "heads" in maps else w_hei
    if "out" not in maps:
        return kept, out.view(-1, heads, width)[:, maps["heads"]].flatten(1)
    return maps["v"].mT @ kept, out @ maps["out"]


def test_slim_models_without_maps_are_refused() -> None:
    case = Case("sd1")
    slim = case.copy()
    again(slim, case.inputs, allocation="uniform")
    del slim.slim_record
    with pytest.raises(slimdiff.SlimdiffError, match="slim_record is None.*slimdiff.load"):
        again(slim, case.inputs)


def test_layers_that_were_slimmed_untied_are_not_timed() -> None:
    case = Case("sd1")
    slim, widths = case.copy(), {"query_key": 12, "value_output": 8}
    entries = {g.name: case.entry(g, widths[g.kind]) for g in case.groups if g.kind in widths}
    slimdiff.rewrite(slim, case.statistics, case.plan(entries))
    with pytest.raises(slimdiff.SlimdiffError, match="attn1 was slimmed untied already"):
        slimdiff.allocate(slim, recorded(slim, case.inputs), slimdiff.Budget(speedup=1.5))


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux", "pixart"])
def test_layers_of_a_slim_model_are_timed_at_widths_that_they_may_take(name: str) -> None:
    case = Case(name)
    slim = twice(case, allocation="uniform")[0]
    groups = slimdiff.groups_of(slim)
    found = profile(slim, groups, case.inputs[0])
    for group in groups:
        if not (group.kind == "value_output" and group.query_width != group.width):
            assert max(found.layers[group.layer]) == group.width


def test_multiples_go_on_from_the_dense_width() -> None:
    """64 channels per head in steps of 8: what is left of them still goes in steps of 8."""
    from slimdiff.allocate import allowed_sizes

    assert allowed_sizes(24, 8) == [4, 8, 12, 16, 20, 24]
    assert allowed_sizes(24, 8, origin=64) == [8, 16, 24]


def test_every_family_slimmed_twice_loads_in_plain_diffusers(tmp_path: Path) -> None:
    expected = {}
    for name in sorted(set(TINY_MODELS) - NOT_OF_ITS_CONFIG):
        case = Case(name)
        slim = twice(case, allocation="uniform")[0]
        slimdiff.save(slim, tmp_path / name)
        expected[name] = outputs(slim, case.inputs[:1])[0].flatten()
    assert_plain_diffusers_gives(expected, tmp_path)
