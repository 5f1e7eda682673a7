"""Joint errors and what shrinks: predictions that agree with measurements, and the best plan."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import slimdiff
from slimdiff.bundles import Allocation
from slimdiff.choosing import best_of
from slimdiff.config import RECIPES
from slimdiff.curves import ErrorCurve, probes_of
from slimdiff.errors import SlimdiffError
from slimdiff.fitting import measured_error
from slimdiff.groups import LAYERS
from slimdiff.jobs import Job
from slimdiff.joint import PARTS, _fitted, parts_of, scaled
from slimdiff.widths import measure_curves
from tiny_models import TINY_MODELS


@dataclass
class Case:
    model: Any
    statistics: slimdiff.Statistics
    curves: dict[str, ErrorCurve]

    def job(self, **budget: Any) -> Job:
        settings = Allocation("probed")
        recipe = RECIPES["slimdiff"]
        return Job(
            *(self.model, self.statistics, slimdiff.Budget(**budget)),
            *(recipe, settings, None, self.curves),
        )


def case_of(name: str) -> Case:
    model, inputs = TINY_MODELS[name]()
    with slimdiff.record(model) as statistics:
        for call in inputs:
            model(**call)
    return Case(model, statistics, measure_curves(model, statistics))


@pytest.fixture(scope="module")
def case() -> Case:
    return case_of("sd1")


def test_parts_follow_the_denoiser_and_are_few(case: Case) -> None:
    groups = slimdiff.groups_of(case.model)
    parts = parts_of(groups)
    assert set(parts) == {group.name for group in groups}
    assert sorted(set(parts.values())) == list(range(max(parts.values()) + 1))
    assert 1 < max(parts.values()) + 1 <= PARTS
    mid = {parts[group.name] for group in groups if group.layer.startswith("mid_block.")}
    assert len(mid) == 1


@given(
    errors=st.lists(st.floats(1e-6, 1.0), min_size=6, max_size=6),
    kinds=st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=2),
    parts=st.lists(st.floats(0.3, 1.0), min_size=3, max_size=3),
)
def test_factors_make_both_sums_those_measured(errors, kinds, parts) -> None:
    """Every kind meets every part, so iterative proportional fitting converges."""
    predicted = {str(i): error for i, error in enumerate(errors)}
    of = {n: f"kind{int(n) % 2}" for n in predicted}, {n: f"part{int(n) // 2}" for n in predicted}
    measured = (
        {f"kind{i}": value for i, value in enumerate(kinds)},
        {f"part{i}": value for i, value in enumerate(parts)},
    )
    by_kind, by_part = _fitted(predicted, of, measured, rounds=500)
    share = sum(kinds) / sum(parts)
    for table, wanted, unit in ((of[0], measured[0], 1.0), (of[1], measured[1], share)):
        for key, value in wanted.items():
            own = [n for n in predicted if table[n] == key]
            total = sum(by_kind[of[0][n]] * by_part[of[1][n]] * predicted[n] for n in own)
            assert total == pytest.approx(unit * value, rel=1e-2)


def test_scaled_curves_predict_what_was_measured(case: Case) -> None:
    job = case.job(params=0.8).removing()
    plan = job.plan()
    curves, whole, _ = scaled(job.shared.choosing, job.shared.swaps, plan, case.curves)
    assert whole == pytest.approx(job.shared.choosing.error(job.shared.weights(plan)))
    total = sum(curves[name].of(entry) for name, entry in plan.entries.items())
    assert total == pytest.approx(whole, rel=0.2)
    again = job.predicting(curves).plan()
    assert again.figures["params"] <= 0.8 * again.figures["params_dense"]


@pytest.mark.parametrize("budget", [{"params": 0.75}, {"macs": 0.7}])
def test_no_plan_with_fewer_kinds_is_measured_to_lose_less(case: Case, budget: Any) -> None:
    job = case.job(**budget)
    best = best_of(job, Job.plan)
    least = job.loses(best)
    assert least > 0
    changed = {LAYERS[group.kind] for group in best.changed(job.groups)}
    for layers in changed:
        for allowed in (job.removing(), job):
            try:
                fewer = allowed.keeping(layers).plan()
            except SlimdiffError:
                continue
            assert not any(LAYERS[g.kind] == layers for g in fewer.changed(job.groups))
            assert least <= 1.1 * job.loses(fewer)


def test_quality_is_met_with_as_few_macs_as_any_kind_left_out(case: Case) -> None:
    plan = slimdiff.allocate(
        case.model, case.statistics, slimdiff.Budget(quality=1e-3), curves=case.curves
    )
    assert plan.figures["measured_error"] <= 1e-3
    assert plan.figures["macs"] < plan.figures["macs_dense"]


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_groups_that_share_a_linear_are_swapped_in_together(name: str) -> None:
    """The single blocks of FLUX put attention and feed-forward through one projection."""
    case = case_of(name)
    groups = slimdiff.groups_of(case.model)
    plan = case.job(params=0.7).plan()
    probes = probes_of(case.model, case.statistics)
    predicted = measured_error(probes, groups, case.statistics, plan, case.curves)
    slim = copy.deepcopy(case.model)
    after = probes_of(slim, case.statistics)
    slimdiff.rewrite(slim, case.statistics, plan, curves=case.curves)
    assert after.error({}) == pytest.approx(predicted, rel=1e-3)
