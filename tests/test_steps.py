"""Weights go by the step that a call is in, however often a sampler calls."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import slimdiff
from slimdiff.steps import CONVENTIONS, Steps, step_weight
from tiny_pipeline import tiny_pipeline, tiny_sd3_pipeline

STEPS = 6


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int, int]]:
    """Timestep, place and number of places of every call that is weighed."""
    seen: list[tuple[float, int, int]] = []
    own = Steps.place

    def place(self: Steps, timestep: Any) -> tuple[int, int]:
        found = own(self, timestep)
        seen.append((float(torch.as_tensor(timestep).max()), *found))
        return found

    monkeypatch.setattr(Steps, "place", place)
    return seen


def calibrated(pipe: Any) -> slimdiff.Statistics:
    config = slimdiff.CalibrationConfig(
        num_inference_steps=STEPS, batch_size=1, timestep_weights="log", steps_per_prompt=None
    )
    return slimdiff.calibrate(pipe, ["a red circle"], config)


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        ("DDIMScheduler", STEPS),
        ("EulerDiscreteScheduler", STEPS),
        ("HeunDiscreteScheduler", 2 * STEPS - 1),
        ("KDPM2DiscreteScheduler", 2 * STEPS - 1),
        ("KDPM2AncestralDiscreteScheduler", 2 * STEPS - 1),
        ("PNDMScheduler", None),
        ("DPMSolverSinglestepScheduler", STEPS),
        ("UniPCMultistepScheduler", STEPS),
    ],
)
def test_weights_fall_over_the_whole_way(
    kind: str, calls: int | None, placed: list[tuple[float, int, int]]
) -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
    calibrated(pipe)
    assert calls is None or len(placed) == calls
    assert len(placed) >= STEPS
    times = sorted({time for time, _, _ in placed}, reverse=True)
    for time, place, count in placed:
        assert (place, count) == (1 + times.index(time), len(times))
    weights = [step_weight(place, count) for _, place, count in placed]
    assert (max(weights), min(weights)) == (pytest.approx(1.5), pytest.approx(0.5))
    assert placed[0][1] == 1 and placed[-1][1] == len(times)
    assert sum(weight == pytest.approx(0.5) for weight in weights) <= 2


def test_pndm_with_runge_kutta_steps(placed: list[tuple[float, int, int]]) -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=False)
    calibrated(pipe)
    times = sorted({time for time, _, _ in placed}, reverse=True)
    assert len(placed) > len(times)
    assert all(place == 1 + times.index(time) for time, place, _ in placed)


def test_flow_models(placed: list[tuple[float, int, int]]) -> None:
    calibrated(tiny_sd3_pipeline())
    assert [place for _, place, _ in placed] == list(range(1, STEPS + 1))


class Halves:
    """A pipeline that calls its denoiser once for each half of guidance, as told by `tell`."""

    def __init__(self, tell: Any = lambda t: t) -> None:
        pipe = tiny_pipeline()
        self.unet, self.scheduler, self.tell = pipe.unet, pipe.scheduler, tell

    def set_progress_bar_config(self, **_: Any) -> None:
        """There is none."""

    def __call__(self, prompt: list[str], num_inference_steps: int, generator: Any) -> None:
        self.scheduler.set_timesteps(num_inference_steps)
        states = torch.randn(2, 7, self.unet.config.cross_attention_dim, generator=generator[0])
        x = torch.randn(1, 4, 16, 16, generator=generator[0])
        for t in self.scheduler.timesteps:
            u, c = (
                self.unet(x, self.tell(t), states[i : i + 1], return_dict=False)[0] for i in (0, 1)
            )
            x = self.scheduler.step(u + 3 * (c - u), t, x).prev_sample


def test_a_pipeline_that_calls_twice_a_step(placed: list[tuple[float, int, int]]) -> None:
    statistics = calibrated(Halves())
    assert [place for _, place, _ in placed] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    expected = sum(step_weight(place, STEPS) for place in range(1, STEPS + 1)) * 2
    assert statistics.weights["mid_block.attentions.0.transformer_blocks.0.attn2/k"] == (
        pytest.approx(7 * expected)
    )


@pytest.mark.parametrize("number", range(len(CONVENTIONS)))
def test_what_pipelines_make_of_a_timestep_is_undone(
    number: int, placed: list[tuple[float, int, int]]
) -> None:
    tell = [
        lambda t: t,
        lambda t: t / 1000,
        lambda t: 1 - t / 1000,
        lambda t: 1000 - t,
    ][number]
    calibrated(Halves(tell))
    assert [place for _, place, _ in placed[::2]] == list(range(1, STEPS + 1))


def test_half_precision_and_timesteps_of_rows() -> None:
    class Flow:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    Flow.scheduler.set_timesteps(20)
    steps = Steps(Flow, 20)
    for place, time in enumerate(Flow.scheduler.timesteps, start=1):
        assert steps.place((time / 1000).bfloat16().expand(2)) == (place, 20)
        tokens = torch.stack([torch.zeros(()), time / 1000]).expand(2, 2)
        assert steps.place(tokens) == (place, 20)


def test_what_is_told_otherwise_goes_by_its_first_appearance() -> None:
    class Own:
        scheduler = None

    steps = Steps(Own, 3)
    told = [-7.5, -7.5, -3.25, -3.25, 41.0, 41.0, 99.0]
    assert [steps.place(t) for t in told] == [(p, 3) for p in (1, 1, 2, 2, 3, 3, 3)]
    pipe = tiny_pipeline()
    pipe.scheduler.set_timesteps(3)
    steps = Steps(pipe, 3)
    assert [steps.place(-5000.0 - t) for t in range(3)] == [(1, 3), (2, 3), (3, 3)]


def test_a_second_run_begins_anew() -> None:
    pipe = tiny_pipeline()
    steps = Steps(pipe, 4)
    for count in (4, 5):
        pipe.scheduler.set_timesteps(count)
        assert [steps.place(t)[0] for t in pipe.scheduler.timesteps] == list(range(1, count + 1))
