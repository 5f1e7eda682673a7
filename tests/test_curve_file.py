"""Error curves are kept beside the statistics, and only used where they belong."""

import pytest
import torch

import slimdiff
from slimdiff.config import RECIPES
from slimdiff.curve_file import CurveFile
from slimdiff.results import read
from slimdiff.widths import measure_curves
from tiny_models import TINY_MODELS
from tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def recorded():
    model, inputs = next(iter(TINY_MODELS.values()))()
    with slimdiff.record(model) as statistics:
        for call in inputs:
            model(**call)
    return model, statistics


def test_a_second_measurement_reads_the_first(recorded, tmp_path):
    model, statistics = recorded
    seen = []
    first = measure_curves(model, statistics, folder=tmp_path, progress=lambda *s: seen.append(s))
    asked = len(seen)
    again = measure_curves(model, statistics, folder=tmp_path, progress=lambda *s: seen.append(s))
    assert asked == len(seen) and len([s for s in seen if s[0] == "probe"]) == len(first)
    for name, curve in first.items():
        assert torch.equal(curve.errors, again[name].errors) and curve.gain == again[name].gain
        assert (curve.order is None) == (again[name].order is None)
    budget = slimdiff.Budget(params=0.9)
    plans = [slimdiff.allocate(model, statistics, budget, curves=c) for c in (first, again)]
    assert plans[0].entries == plans[1].entries


def test_an_interrupted_measurement_goes_on(recorded, tmp_path):
    model, statistics = recorded
    whole = measure_curves(model, statistics, folder=tmp_path)
    kept = CurveFile(tmp_path, statistics, RECIPES["slimdiff"], probed=True, denoiser=model)
    some = dict(list(whole.items())[:2])
    kept.save(some)
    seen = []
    again = measure_curves(model, statistics, folder=tmp_path, progress=lambda *s: seen.append(s))
    probed = [s for s in seen if s[0] == "probe"]
    assert len(probed) == len(whole) - 2 and probed[0][1] == 3
    assert set(again) == set(whole) == set(kept.load())


def test_curves_of_other_statistics_or_recipes_are_not_used(recorded, tmp_path):
    model, statistics = recorded
    measure_curves(model, statistics, folder=tmp_path)
    slim, paper = RECIPES["slimdiff"], RECIPES["paper"]
    file = CurveFile(tmp_path, statistics, slim, probed=True, denoiser=model)
    assert file.load()
    assert not CurveFile(tmp_path, statistics, paper, probed=True, denoiser=model).load()
    assert not CurveFile(tmp_path, statistics, slim, probed=False, denoiser=model).load()
    other = slimdiff.Statistics.merge([statistics, statistics])
    assert not CurveFile(tmp_path, other, slim, probed=True, denoiser=model).load()
    file.path.write_bytes(file.path.read_bytes()[:200])
    assert not file.load()


def test_compress_writes_what_it_did(tmp_path):
    pipe, file = tiny_pipeline(), tmp_path / "r.json"
    config = slimdiff.CalibrationConfig(num_inference_steps=2, num_probes=2)
    budget = slimdiff.Budget(params=0.93)
    plan = slimdiff.compress(pipe, ["a", "b", "c"], budget, config=config, results=file, pictures=2)
    found = read(file)
    assert found["plan"]["figures"]["params"] == plan.figures["params"]
    params = sum(row["params"] for row in found["groups"]) + found["rest"]["params"]
    assert params == plan.figures["params"]
    assert [row["prompt"] for row in found["images"]] == ["a", "b"]
    assert all(row["dense"] != row["slim"] for row in found["images"])
    for row in found["groups"]:
        curve = row["curve"]
        assert row["width"] in curve["widths"] and row["dense_width"] == curve["widths"][-1]
        assert len(curve["errors"]) == len(curve["widths"])
        assert curve["errors"][-1] < 1e-9 or row["heads"] < row["dense_heads"]
