"""Calibration of a whole pipeline: what it records, resumes and refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slimdiff
from slimdiff.calibrate import WHOLE, held_out, schedule
from slimdiff.statistics import WEIGHTS_FILE, Statistics
from slimdiff.steps import step_weight
from tiny_pipeline import image, tiny_pipeline

CONFIG = slimdiff.CalibrationConfig(num_inference_steps=2, batch_size=1, guidance_scale=3.0)
PROMPTS = [f"a red circle number {i}" for i in range(4)]

INTERRUPTED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_calibrate import CONFIG, PROMPTS
from tiny_pipeline import tiny_pipeline
import slimdiff
slimdiff.calibrate(tiny_pipeline(), PROMPTS, CONFIG, checkpoint=sys.argv[2],
                   progress=lambda stage, done, total: print(done, flush=True))
"""


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


def same(a: Statistics, b: Statistics) -> bool:
    sums = a.sums.keys() == b.sums.keys() and all(
        torch.equal(a.sums[name], b.sums[name]) for name in a.sums
    )
    return sums and a.weights == b.weights and a.probes.rows.keys() == b.probes.rows.keys()


def test_records_both_guidance_halves_of_every_step(pipe: Any) -> None:
    statistics = slimdiff.calibrate(pipe, PROMPTS[:2], CONFIG)
    assert (statistics.calls, statistics.batches) == (2, 2), "one of two prompts gives no moments"
    group = next(g for g in slimdiff.groups_of(pipe.unet) if g.kind == "query_key")
    keys = f"{group.layer}/q"
    tokens = statistics.weights[keys] / statistics.calls
    side = pipe.unet.config.sample_size
    kept = min(side * side, CONFIG.tokens_per_sample)
    assert tokens == 2 * kept, "both halves of classifier-free guidance"
    held_out, others = statistics.probes, statistics.seen
    assert held_out.guidance == 3.0 and statistics.held_out
    for probes in (held_out, others):
        rows = Counter(probe.point for probe in probes.rows.values())
        assert list(rows.values()) == [2, 2], "two steps, both halves of each"
        assert len({probe.prompt for probe in probes.rows.values()}) == 2
    assert not set(held_out.rows) & set(others.rows)


@given(count=st.integers(1, 400), size=st.integers(1, 9), steps=st.integers(1, 30))
def test_every_prompt_runs_once_and_held_out_ones_through_all_steps(
    count: int, size: int, steps: int
) -> None:
    config = slimdiff.CalibrationConfig(num_inference_steps=steps, batch_size=size)
    runs = schedule(count, config)
    assert sorted(place for run in runs for place in run.prompts) == list(range(count))
    held = [place for run in runs if run.held_out for place in run.prompts]
    assert held == held_out(count) and len(held) < count
    assert count < 8 or 2 <= len(held) <= max(4, round(count / 10))
    assert all(run.steps == steps for run in runs if run.held_out)
    others = [run.steps for run in runs if not run.held_out]
    assert others[::WHOLE] == [steps] * len(others[::WHOLE]), "every timestep is visited"
    assert set(others) <= {steps, min(5, steps)}


def test_killed_and_resumed_equals_uninterrupted(pipe: Any, tmp_path: Path) -> None:
    """`kill -9` after a finished batch, then the same call again: bit-identical statistics."""
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", INTERRUPTED, here, str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().strip() == "1"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = Statistics.load(tmp_path / "killed").batches
    assert 1 <= left < len(PROMPTS)
    resumed = slimdiff.calibrate(pipe, PROMPTS, CONFIG, checkpoint=tmp_path / "killed")
    assert same(resumed, slimdiff.calibrate(pipe, PROMPTS, CONFIG))


def test_finished_checkpoint_is_used_as_it_is(pipe: Any, tmp_path: Path) -> None:
    first = slimdiff.calibrate(pipe, PROMPTS[:2], CONFIG, checkpoint=tmp_path)
    written = (tmp_path / WEIGHTS_FILE).stat().st_mtime_ns
    time.sleep(0.01)
    again = slimdiff.calibrate(pipe, PROMPTS[:2], CONFIG, checkpoint=tmp_path)
    assert same(first, again) and (tmp_path / WEIGHTS_FILE).stat().st_mtime_ns == written


def test_checkpoint_of_another_run_is_refused(pipe: Any, tmp_path: Path) -> None:
    slimdiff.calibrate(pipe, PROMPTS[:1], CONFIG, checkpoint=tmp_path)
    with pytest.raises(slimdiff.SlimdiffError, match="another run"):
        slimdiff.calibrate(pipe, PROMPTS[:2], CONFIG, checkpoint=tmp_path)


def test_an_option_that_kept_statistics_do_not_know_was_not_given(
    pipe: Any, tmp_path: Path
) -> None:
    first = slimdiff.calibrate(pipe, PROMPTS[:1], CONFIG)
    del first.source["config"]["max_sequence_length"]
    first.save(tmp_path)
    assert same(first, slimdiff.calibrate(pipe, PROMPTS[:1], CONFIG, checkpoint=tmp_path))
    other = replace(CONFIG, max_sequence_length=7)
    with pytest.raises(slimdiff.SlimdiffError, match="max_sequence_length None, not 7"):
        slimdiff.calibrate(pipe, PROMPTS[:1], other, checkpoint=tmp_path)


def test_no_prompts_is_refused(pipe: Any) -> None:
    with pytest.raises(slimdiff.SlimdiffError, match="no calibration prompts"):
        slimdiff.calibrate(pipe, [], CONFIG)


def test_log_weights_follow_the_formula(pipe: Any) -> None:
    weights = [step_weight(step, 20) for step in range(1, 21)]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] == pytest.approx(1.5) and weights[-1] == pytest.approx(0.5)
    config = slimdiff.CalibrationConfig(
        num_inference_steps=2, batch_size=1, guidance_scale=3.0, timestep_weights="log"
    )
    plain = slimdiff.calibrate(pipe, PROMPTS[:1], CONFIG)
    weighted = slimdiff.calibrate(pipe, PROMPTS[:1], config)
    name = next(iter(plain.weights))
    assert weighted.weights[name] == pytest.approx(plain.weights[name] * (1.5 + 0.5) / 2)


def test_compress_meets_the_budget_and_reports_its_error(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    dense = sum(p.numel() for p in pipe.unet.parameters())
    plan = slimdiff.compress(
        pipe, PROMPTS[:2], slimdiff.Budget(params=0.97), config=CONFIG, checkpoint=tmp_path / "s"
    )
    slim = sum(p.numel() for p in pipe.unet.parameters())
    assert slim == plan.figures["params"] <= 0.97 * dense
    assert 0 < plan.figures["error_on_probes"] < 0.05
    assert set(plan.figures["seconds"]) == {"calibrate", "allocate", "rewrite"}


def test_a_slim_pipeline_is_compressed_again(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    dense = sum(p.numel() for p in pipe.unet.parameters())
    plans = [
        slimdiff.compress(pipe, PROMPTS[:1], slimdiff.Budget(params=0.9), config=CONFIG)
        for _ in range(2)
    ]
    slim, record = sum(p.numel() for p in pipe.unet.parameters()), pipe.unet.slim_record
    assert plans[1].figures["params_dense"] == plans[0].figures["params"]
    assert plans[1].figures["started_from"]["params"] == plans[0].figures["params"]
    assert slim == plans[1].figures["params"] <= 0.9 * plans[0].figures["params"]
    assert record.plan.figures["params_dense"] == dense and record.plan.figures["params"] == slim
    assert record.plan.budget == "--params 0.9, then --params 0.9"
    slimdiff.save_pipeline(pipe, tmp_path / "slim")
    loaded = slimdiff.load_pipeline(tmp_path / "slim")
    assert torch.equal(*(image(p, output_type="latent") for p in (pipe, loaded)))
    assert loaded.unet.slim_record.plan == record.plan
    assert f"{dense:,} to {slim:,}" in (tmp_path / "slim" / "README.md").read_text()


def test_statistics_of_the_dense_model_are_not_those_of_the_slim_one(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    how = {"config": CONFIG, "checkpoint": tmp_path / "s"}
    slimdiff.compress(pipe, PROMPTS[:1], slimdiff.Budget(params=0.9), **how)
    with pytest.raises(slimdiff.SlimdiffError, match="another run .other widths"):
        slimdiff.compress(pipe, PROMPTS[:1], slimdiff.Budget(params=0.9), **how)


def test_edited_plan_is_used_as_given() -> None:
    pipe = tiny_pipeline()
    group = next(g for g in slimdiff.groups_of(pipe.unet) if g.kind == "feed_forward")
    entry = slimdiff.Entry(group.kind, 5, group.width)
    plan = slimdiff.Plan("UNet2DConditionModel", "slimdiff", {group.name: entry})
    read = slimdiff.Plan.from_json(plan.to_json())
    used = slimdiff.compress(pipe, PROMPTS[:1], plan=read, config=CONFIG)
    assert used.figures["params"] == sum(p.numel() for p in pipe.unet.parameters())
    assert used.figures["params"] < used.figures["params_dense"]
    assert pipe.unet.get_submodule(group.paths["down"]).in_features == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": -1}, "width is -1, expected an integer from 0"),
        ({"width": 0}, "attention layer's other half is removed"),
        ({"width": 10**6}, "width is 1000000"),
        ({"dense_width": 7}, "was it made for another model"),
    ],
)
def test_plans_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    pipe = tiny_pipeline()
    group = next(g for g in slimdiff.groups_of(pipe.unet) if g.kind == "query_key")
    fields = {"width": 4, "dense_width": group.width, "heads": group.heads} | change
    entry = slimdiff.Entry(group.kind, dense_heads=group.heads, **fields)
    plan = slimdiff.Plan("UNet2DConditionModel", "slimdiff", {group.name: entry})
    with pytest.raises(slimdiff.SlimdiffError, match=message):
        slimdiff.compress(pipe, PROMPTS[:1], plan=plan, config=CONFIG)


def test_impossible_budget_says_the_smallest_possible() -> None:
    pipe = tiny_pipeline()
    with pytest.raises(slimdiff.SlimdiffError, match="smallest possible is"):
        slimdiff.compress(pipe, PROMPTS[:1], slimdiff.Budget(params=0.01), config=CONFIG)


def test_a_pipeline_that_guides_by_a_negative_prompt_is_given_one(pipe: Any) -> None:
    """Qwen-Image is not guided without: the half that sees no prompt would never be recorded."""
    given: list[Any] = []

    class Guided:
        unet = pipe.unet

        def __call__(
            self,
            prompt: list[str],
            num_inference_steps: int,
            generator: Any,
            negative_prompt: list[str] | None = None,
            true_cfg_scale: float = 4.0,
        ) -> None:
            given.append(negative_prompt)
            pipe(prompt=prompt, num_inference_steps=num_inference_steps, output_type="latent")

    class Distilled(Guided):
        def __call__(self, prompt: list[str], true_cfg_scale: float = 1.0, **more: Any) -> None:
            super().__call__(prompt, **more)

    config = replace(CONFIG, batch_size=2)
    assert slimdiff.calibrate(Guided(), PROMPTS[:1], config).probes.guidance == 4.0
    slimdiff.calibrate(Distilled(), PROMPTS[:1], config)
    assert given == [[" "], None]
