"""Like blocks that share widths: few sets of them, the budget met, and one width per kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slimdiff
from slimdiff.block_kinds import _clusters, distinct, like_blocks
from slimdiff.errors import SlimdiffError
from tiny_models import TINY_MODELS


def recorded(name: str) -> tuple[Any, slimdiff.Statistics, list[dict[str, Any]]]:
    model, inputs = TINY_MODELS[name]()
    with slimdiff.record(model) as statistics:
        for call in inputs:
            model(**call)
    return model, statistics, inputs


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_like_blocks_share_their_widths(name: str) -> None:
    model, statistics, inputs = recorded(name)
    groups, budget = slimdiff.groups_of(model), slimdiff.Budget(params=0.7)
    free = slimdiff.allocate(model, statistics, budget)
    plan = slimdiff.allocate(model, statistics, budget, block_kinds=1)
    classes = like_blocks(model, groups)
    assert distinct(model, groups, plan) == len(classes)
    assert distinct(model, groups, free) >= len(classes)
    assert max(map(len, classes.values())) > 1, "some blocks are alike"
    assert plan.figures["params"] <= 0.7 * plan.figures["params_dense"]
    slimdiff.rewrite(model, statistics, plan)
    with torch.inference_mode():
        output = model(**inputs[0], return_dict=False)[0]
    assert output.isfinite().all()


def test_without_probed_errors_blocks_are_not_sorted() -> None:
    model, statistics, _ = recorded("sd1")
    budget = slimdiff.Budget(params=0.7)
    with pytest.raises(SlimdiffError, match="choose the allocation probed"):
        slimdiff.allocate(model, statistics, budget, allocation="uniform", block_kinds=2)
    with pytest.raises(SlimdiffError, match="block_kinds must be at least 1, got 0"):
        slimdiff.allocate(model, statistics, budget, block_kinds=0)


@given(
    points=st.lists(st.tuples(*[st.integers(0, 8)] * 3), min_size=1, max_size=10),
    most=st.integers(1, 5),
)
def test_clusters_are_few_and_hold_each_block_once(points: list, most: int) -> None:
    shares = {str(i): tuple(v / 8 for v in point) for i, point in enumerate(points)}
    found = _clusters(shares, most)
    assert sorted(block for own in found for block in own) == sorted(shares)
    assert len(found) == min(most, len(set(points)))
