"""What a compression says of prompts that it was not calibrated with."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

import slimdiff
from slimdiff.evaluate.velocity import velocity_error
from slimdiff.held_out import HeldOut
from tiny_pipeline import tiny_pipeline

CONFIG = slimdiff.CalibrationConfig(num_inference_steps=4, batch_size=4, guidance_scale=2.0)
PROMPTS = [f"{colour} {thing}" for colour in "abcd" for thing in ("cat", "dog", "tram", "sea")]
OTHERS = [f"{colour} {thing}" for colour in "efg" for thing in ("cat", "dog", "tram", "sea")]


@pytest.fixture(scope="module")
def done() -> tuple[Any, Any, slimdiff.Plan]:
    dense, slim = tiny_pipeline(), tiny_pipeline()
    plan = slimdiff.compress(slim, PROMPTS, slimdiff.Budget(params=0.7), config=CONFIG)
    return dense, slim, plan


def test_the_printed_error_is_that_of_whole_trajectories_of_other_prompts(done: Any) -> None:
    dense, slim, plan = done
    how = {"num_inference_steps": 4, "guidance_scale": 2.0}
    true = velocity_error(dense, slim, OTHERS, **how).relative
    assert plan.figures["held_out"] is True
    assert true / 1.6 < plan.figures["error_on_probes"] < 1.6 * true
    low, high = plan.figures["error_interval"]
    assert low < plan.figures["error_on_probes"] < high
    assert plan.figures["error_guided"] > 0 and plan.figures["error_on_seen"] > 0


def test_with_one_prompt_the_figures_say_that_it_is_the_calibrations_own() -> None:
    plan = slimdiff.compress(
        tiny_pipeline(), PROMPTS[:1], slimdiff.Budget(params=0.9), config=CONFIG
    )
    assert plan.figures["held_out"] is False
    assert "error_on_seen" not in plan.figures and "error_interval" not in plan.figures


def test_few_prompts_are_told_with_what_more_would_bring(
    done: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights that are wrong on the held-out inputs alone stand for moments of too few prompts."""
    pipe = tiny_pipeline()
    statistics = slimdiff.calibrate(pipe, PROMPTS, CONFIG)
    unet = copy.deepcopy(pipe.unet)
    held_out = HeldOut(unet, statistics)
    assert held_out.seen is not None
    held_out.seen.dense = [[y * 1.001 for y in call] for call in held_out.seen.dense]
    with torch.no_grad():
        for parameter in unet.conv_out.parameters():
            parameter.mul_(1.01)
    with caplog.at_level(logging.WARNING, logger="slimdiff"):
        figures = held_out.figures()
    unseen, seen = figures["error_on_probes"], figures["error_on_seen"]
    assert unseen == pytest.approx(1e-4, rel=1e-2) and seen == pytest.approx(8.1e-5, rel=1e-2)
    assert "more_prompts" not in figures and not caplog.records
    held_out.seen.dense = [[y * 1.0095 for y in call] for call in held_out.seen.dense]
    with caplog.at_level(logging.WARNING, logger="slimdiff"):
        figures = held_out.figures()
    share = (1 - figures["error_on_seen"] / figures["error_on_probes"]) / 2 * 100 / 116
    assert figures["more_prompts"]["share_spared"] == pytest.approx(share)
    assert "16 prompts are few" in caplog.text
