"""Whole layers of every family: which may go, which stay and why, and what they then put out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slimdiff
from slimdiff import costs as costs_
from slimdiff.groups import LAYERS, Group, stem
from slimdiff.removal import constant_weights, mean_name, removable_layers, why_it_stays
from slimdiff.streaming import rewrite_folder
from test_contract import CASES, NOT_OF_ITS_CONFIG, Case, case, output_of, outputs

__all__ = ["case"]


def removing(case: Case, layers: set[str]) -> slimdiff.Plan:
    return case.plan({g.name: case.entry(g, 0) for g in case.groups if g.layer in layers})


def one_of_each(case: Case) -> set[str]:
    """A layer of each sort that may go; the last, since the first are often special."""
    may_go = removable_layers(case.model, case.groups, case.statistics)
    return set({LAYERS[g.kind]: g.layer for g in case.groups if g.layer in may_go}.values())


def halved(case: Case, plan: slimdiff.Plan) -> slimdiff.Plan:
    """The plan, with half widths for all layers that stay."""
    rest = {g.name: case.entry(g, g.width // 2) for g in case.groups}
    return case.plan(rest | plan.entries)


@CASES
def test_what_may_go_was_recorded_and_puts_out_its_mean(case: Case) -> None:
    layers = one_of_each(case)
    swapped: dict[str, Tensor] = {}
    for group in case.groups:
        known = mean_name(group) in case.statistics.sums
        assert known == (group.layer in removable_layers(case.model, case.groups))
        if group.layer in layers:
            swapped |= constant_weights(case.model, group, case.statistics)
    slim = slimdiff.rewrite(case.copy(), case.statistics, removing(case, layers))
    with torch.no_grad():
        for call, got in zip(case.inputs, outputs(slim, case.inputs), strict=True):
            call = call | {"return_dict": False}
            want = output_of(torch.func.functional_call(case.model, swapped, (), call))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@CASES
def test_slim_models_without_some_layers_are_counted_saved_and_compiled(
    case: Case, tmp_path: Path, request: Any
) -> None:
    plan = halved(case, removing(case, one_of_each(case)))
    slim: Any = slimdiff.rewrite(case.copy(), case.statistics, plan)
    dense = costs_.measure(case.model, case.groups, case.statistics.probes.batches(1)[0])
    saved = sum(
        dense.groups[g.name].of("params", g.inner)
        - dense.groups[g.name].of("params", g.heads * plan.entries[g.name].width)
        for g in case.groups
    )
    assert costs_.parameters(slim) == dense.params - saved
    torch.compiler.reset()
    compiled = torch.compile(slim, fullgraph=True, backend="eager")
    got, expected = outputs(compiled, case.inputs[:1]), outputs(slim, case.inputs[:1])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if request.node.callspec.id not in NOT_OF_ITS_CONFIG:
        slimdiff.save(slim, tmp_path / "slim")
        loaded = slimdiff.load(tmp_path / "slim")
        assert torch.equal(outputs(loaded, case.inputs[:1])[0], expected[0])


@CASES
def test_what_cannot_go_is_refused_with_its_reason(case: Case) -> None:
    may_go = removable_layers(case.model, case.groups)
    before = dict(case.model.named_parameters())
    for group in {g.layer: g for g in case.groups if g.layer not in may_go}.values():
        with pytest.raises(slimdiff.SlimdiffError, match=r"width 0\), but .*give it a width"):
            slimdiff.rewrite(case.model, case.statistics, removing(case, {group.layer}))
    assert all(before[name] is p for name, p in case.model.named_parameters())


def sort_of(group: Group) -> str:
    if group.columns:
        return "is shared with another layer"
    if any(role != stem(role) for role in group.paths):
        return "joins two streams"
    return "modulation group" if group.kind == "modulation" else ""


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_joint_attention_shared_linears_and_modulations_stay(name: str) -> None:
    case = Case(name)
    told = {group.name: why_it_stays(case.model, group) for group in case.groups}
    sorts = {sort_of(group) for group in case.groups}
    assert {"joins two streams", "modulation group", ""} <= sorts
    for group in case.groups:
        if group.kind != "query_key" and (sort := sort_of(group)):
            assert sort in str(told[group.name])
    assert any(why is None for why in told.values()), "plain feed-forward layers may go"


@pytest.mark.parametrize("name", ["sd1", "sd3", "pixart"])
def test_folders_are_rewritten_without_the_same_layers(name: str, tmp_path: Path) -> None:
    case = Case(name)
    plan = halved(case, removing(case, one_of_each(case)))
    case.model.save_pretrained(tmp_path / "dense")
    slimdiff.save(slimdiff.rewrite(case.copy(), case.statistics, plan), tmp_path / "whole")
    case.statistics.save(tmp_path / "statistics")
    stored = slimdiff.Statistics.open(tmp_path / "statistics")
    rewrite_folder(tmp_path / "dense", tmp_path / "blocks", stored, plan)
    pair = [slimdiff.load(tmp_path / name) for name in ("whole", "blocks")]
    a, b = (model.state_dict() for model in pair)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert pair[0].config["slimdiff"] == pair[1].config["slimdiff"]
    stays = next((g for g in case.groups if sort_of(g) and g.kind != "query_key"), None)
    if stays is not None:
        with pytest.raises(slimdiff.SlimdiffError, match=r"width 0\), but"):
            refused = removing(case, {stays.layer})
            rewrite_folder(tmp_path / "dense", tmp_path / "none", case.statistics, refused)
        assert not (tmp_path / "none").exists()
