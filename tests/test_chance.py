"""Chance outside the generators that a pipeline is given: the same seed draws the same picture."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import slimdiff
from slimdiff.chance import seeded
from slimdiff.evaluate import generate, velocity_error
from slimdiff.evaluate.sampling import first_call
from slimdiff.metrics import image_tensor
from slimdiff.statistics import Statistics
from tiny_pipeline import tiny_pipeline

PROMPTS = ["a red circle", "a blue square", "a tram", "a cat"]
CONFIG = slimdiff.CalibrationConfig(num_inference_steps=3, batch_size=1, num_probes=2)


class Careless(DDIMScheduler):
    """Adds noise from the global generators in every step, as DPM++ SDE does."""

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **more: Any) -> Any:
        (previous, *rest) = super().step(model_output, timestep, sample, *args, **more)
        noise = torch.randn_like(sample) + float(np.random.rand()) + random.random()
        return (previous + 0.1 * noise, *rest)


def state() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


@pytest.fixture
def pipe() -> Any:
    pipe = tiny_pipeline()
    pipe.scheduler = Careless.from_config(pipe.scheduler.config)
    return pipe


def test_a_pipeline_draws_what_it_drew(pipe: Any) -> None:
    drawn = []
    for _ in range(2):
        before = state()
        images = generate(pipe, PROMPTS, [3, 4, 3, 5], num_inference_steps=3, batch_size=2)
        drawn.append(image_tensor(images))
        assert state() == before, "the user's own draws are not disturbed"
        torch.rand(3), np.random.rand(), random.random()
    assert torch.equal(*drawn)
    other = image_tensor(generate(pipe, PROMPTS[:1], [4], num_inference_steps=3))
    assert not torch.equal(other[0], drawn[0][0])


def test_nothing_is_lost_between_a_pipeline_and_itself(pipe: Any) -> None:
    twin = tiny_pipeline()
    assert velocity_error(pipe, twin, PROMPTS, num_inference_steps=2).relative == 0
    from slimdiff.evaluate import Settings, evaluate

    twin.scheduler = pipe.scheduler
    settings = Settings(num_inference_steps=2, runs=1, pipeline_runs=0)
    images = evaluate(pipe, twin, PROMPTS, settings)["fidelity"]["images"]
    assert (images["psnr"], round(images["ssim"], 6)) == (100, 1)


def test_a_resumed_calibration_is_the_one_that_was_not_interrupted(
    pipe: Any, tmp_path: Path
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(_stage: str, done: int, _all: int) -> None:
        if done == 2:
            raise Interrupted

    before = state()
    whole = slimdiff.calibrate(pipe, PROMPTS, CONFIG)
    assert state() == before
    torch.rand(7)
    with pytest.raises(Interrupted):
        slimdiff.calibrate(pipe, PROMPTS, CONFIG, checkpoint=tmp_path, progress=interrupt)
    assert 0 < Statistics.load(tmp_path).batches < whole.batches
    torch.rand(7)
    resumed = slimdiff.calibrate(pipe, PROMPTS, CONFIG, checkpoint=tmp_path)
    assert all(torch.equal(total, resumed.sums[name]) for name, total in whole.sums.items())
    assert whole.probes.rows.keys() == resumed.probes.rows.keys()


def test_chance_is_as_it_was_after_an_exception(pipe: Any) -> None:
    before = state()
    first_call(pipe, "a cat", num_inference_steps=2)
    with pytest.raises(KeyError), seeded(3):
        torch.rand(3)
        raise KeyError
    assert state() == before


def test_seeds_give_different_draws_that_come_again() -> None:
    drawn = []
    for seed in (0, 1, 0, 2**40):
        with seeded(seed):
            drawn.append((float(torch.rand(())), random.random(), float(np.random.rand())))
    assert drawn[0] == drawn[2] and len(set(drawn)) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_accelerators_are_seeded_too() -> None:
    torch.rand(3, device="cuda")
    before = torch.cuda.get_rng_state()
    drawn = []
    for _ in range(2):
        with seeded(5):
            drawn.append(torch.rand(3, device="cuda"))
    assert torch.equal(*drawn) and torch.equal(torch.cuda.get_rng_state(), before)
