"""Allocation on made-up numbers, against brute force and its own promises."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdiff import SlimdiffError
from slimdiff.allocate import Unit, allowed_sizes, entropic, lagrangian, threshold, uniform

Units = list[Unit]


@st.composite
def units(draw: st.DrawFn) -> Units:
    """Units with strictly rising costs, falling errors, scores and importances."""
    found = []
    for u in range(draw(st.integers(1, 5))):
        dense, step = draw(st.integers(2, 8)), draw(st.integers(1, 50))
        sizes = list(range(1, dense + 1))
        drops = draw(st.lists(st.floats(0, 10), min_size=dense, max_size=dense))
        errors = [sum(drops[i:]) - drops[-1] for i in range(dense)]
        importances = draw(st.lists(st.floats(0, 1), min_size=dense, max_size=dense))
        score = draw(st.floats(0, 1))
        costs = [size * step for size in sizes]
        found.append(Unit(f"unit{u}", sizes, costs, errors, score, importances))
    return found


def cost(found: Units, choice: list[int]) -> int:
    return sum(unit.costs[index] for unit, index in zip(found, choice, strict=True))


def error(found: Units, choice: list[int]) -> float:
    return sum(unit.errors[index] for unit, index in zip(found, choice, strict=True))


ALLOCATORS = {
    "lagrangian": lagrangian,
    "uniform": uniform,
    "entropic": lambda found, limit: entropic(found, limit, 0.1),
    "threshold": threshold,
}


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
@given(found=units(), share=st.floats(0, 1))
def test_never_over_the_limit_and_no_step_up_fits(name: str, found: Units, share: float) -> None:
    least, dense = cost(found, [0] * len(found)), sum(unit.costs[-1] for unit in found)
    limit = round(least + share * (dense - least))
    choice = ALLOCATORS[name](found, limit)
    spent = cost(found, choice)
    assert spent <= limit
    for unit, index in zip(found, choice, strict=True):
        if index + 1 < len(unit.sizes):
            assert spent + unit.costs[index + 1] - unit.costs[index] > limit


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
@given(found=units())
def test_everything_stays_when_it_fits(name: str, found: Units) -> None:
    dense = [len(unit.sizes) - 1 for unit in found]
    assert ALLOCATORS[name](found, cost(found, dense)) == dense


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
@given(found=units())
def test_impossible_limit_says_the_smallest(name: str, found: Units) -> None:
    least = cost(found, [0] * len(found))
    with pytest.raises(SlimdiffError, match=f"{least:,}"):
        ALLOCATORS[name](found, least - 1)


@settings(max_examples=50)
@given(found=units(), share=st.floats(0, 1))
def test_lagrangian_against_brute_force(found: Units, share: float) -> None:
    """The relaxation loses at most one step of one unit against the best of all choices."""
    least, dense = cost(found, [0] * len(found)), sum(unit.costs[-1] for unit in found)
    limit = round(least + share * (dense - least))
    choices = itertools.product(*(range(len(unit.sizes)) for unit in found))
    best = min(error(found, list(c)) for c in choices if cost(found, list(c)) <= limit)
    largest_step = max(unit.errors[0] - unit.errors[-1] for unit in found)
    assert best - 1e-9 <= error(found, lagrangian(found, limit)) <= best + largest_step + 1e-9


def test_lagrangian_spends_where_errors_fall_fastest() -> None:
    steep = Unit("steep", [1, 2, 3], [1, 2, 3], [10.0, 1.0, 0.0])
    flat = Unit("flat", [1, 2, 3], [1, 2, 3], [0.2, 0.1, 0.0])
    assert lagrangian([steep, flat], 4) == [2, 0]


def test_entropic_takes_more_from_blocks_with_less_influence() -> None:
    sizes = list(range(1, 101))
    weak, strong = (Unit(str(s), sizes, sizes, score=s) for s in (0.1, 0.4))
    narrow, wide = entropic([weak, strong], 120, 0.3)
    assert narrow < wide
    cold = entropic([weak, strong], 120, 0.05)
    assert cold[0] < narrow and cold[1] > wide


def test_threshold_keeps_what_is_important() -> None:
    spread = Unit("spread", [1, 2, 3, 4], [1, 2, 3, 4], importances=[1.0, 0.9, 0.8, 0.7])
    peaked = Unit("peaked", [1, 2, 3, 4], [1, 2, 3, 4], importances=[1.0, 0.1, 0.1, 0.1])
    assert threshold([spread, peaked], 5) == [3, 0]


@given(dense=st.integers(1, 6000), multiple=st.sampled_from([1, 8, 16, 64]))
def test_allowed_sizes(dense: int, multiple: int) -> None:
    sizes = allowed_sizes(dense, multiple)
    assert sizes == sorted(set(sizes)) and sizes[0] >= 1 and sizes[-1] == dense
    if dense >= 4 * multiple:
        assert all(size % multiple == 0 for size in sizes[:-1])
    assert len(sizes) >= min(dense, 4)


def test_what_is_left_over_is_not_spent_on_what_loses_more() -> None:
    """A layer that went (size 0) is not brought back narrow, where that loses more."""
    gone = Unit("gone", [0, 8, 16], [0, 8, 16], [0.0, 0.5, 0.0])
    other = Unit("other", [8, 16], [8, 16], [1.0, 0.0])
    assert lagrangian([gone, other], 30) == [0, 1]
    assert lagrangian([gone, other], 32) == [2, 1]
