"""The frontier: error against size, its knee, its page and its command."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import slimdiff
from slimdiff.cli import main
from slimdiff.frontier import MEASURED, POINTS, knee_of
from slimdiff.report import render
from slimdiff.widths import frontier_of
from tiny_models import TINY_MODELS
from tiny_pipeline import tiny_pipeline


@given(bend=st.integers(1, 8))
def test_the_knee_is_where_the_line_bends(bend):
    errors = [(0.1 * i) ** 2 if i <= bend else (0.1 * bend + (i - bend)) ** 2 for i in range(10)]
    assert knee_of([10 - i for i in range(10)], errors) == bend


def test_a_knee_needs_two_points():
    with pytest.raises(ValueError, match="two points"):
        knee_of([1], [0.1])


@pytest.mark.parametrize("metric", ["params", "macs"])
def test_frontier_falls_in_size_and_measures_what_it_predicts(metric):
    unet, inputs = TINY_MODELS["sd1"]()
    with slimdiff.record(unet) as statistics:
        for call in inputs:
            unet(**call)
    found = frontier_of(unet, statistics, metric=metric)
    sizes = [getattr(point, metric) for point in found.points]
    assert len(sizes) == POINTS and sizes == sorted(sizes, reverse=True)
    assert sizes[0] < getattr(found.dense, metric)
    errors = [point.predicted for point in found.points]
    assert errors == sorted(errors) and errors[0] >= 0
    measured = [point for point in found.points if point.measured is not None]
    assert len(measured) == MEASURED
    assert [p.measured for p in measured] == sorted(p.measured for p in measured)
    assert measured[0].measured > 0
    page = render({"frontier": found.section()})
    assert "frontier-params" in page and "frontier-macs" in page and "knee: " in page


def test_unknown_metric_is_refused():
    unet, _ = TINY_MODELS["sd1"]()
    with pytest.raises(slimdiff.SlimdiffError, match="expected params or macs"):
        frontier_of(unet, slimdiff.Statistics("", slimdiff.statistics.Probes(1)), metric="bytes")


def test_commands(tmp_path, monkeypatch, capsys):
    tiny_pipeline(seed=0).save_pretrained(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    monkeypatch.chdir(tmp_path)
    how = ["--prompts", "prompts.txt", "--steps", "2", "--batch-size", "2", "--device", "cpu"]
    with pytest.raises(SystemExit) as done:
        main(["frontier", "tiny", *how])
    assert not done.value.code
    printed = capsys.readouterr().out
    assert "knee" in printed and "tiny-frontier.statistics" in printed
    found = json.loads((tmp_path / "tiny-frontier.json").read_text())["frontier"]
    assert len(found["points"]) == POINTS
    assert "The frontier" in (tmp_path / "tiny-frontier.html").read_text()
    with pytest.raises(SystemExit) as done:
        main(["profile", "tiny", "--device", "cpu", "--json", "--layers", "resnet"])
    assert not done.value.code
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert layers and all("resnets" in layer for layer in layers)
    with pytest.raises(SystemExit) as done:
        main(["profile", "tiny", "--layers", "convolutions"])
    assert done.value.code == 2 and "attention, feed_forward, resnet" in capsys.readouterr().err
