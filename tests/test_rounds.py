"""Rounds: calibrated again halfway, compared with one shot, and kept where that is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slimdiff
from slimdiff import rounds as rounds_
from slimdiff.rounds import on_cpu, put_back_
from slimdiff.statistics import WEIGHTS_FILE
from tiny_pipeline import image, tiny_pipeline

CONFIG = slimdiff.CalibrationConfig(
    num_inference_steps=2, batch_size=2, guidance_scale=3.0, num_probes=4
)
PROMPTS = ["a red circle", "a blue ring"]
UNIFORM = {"config": CONFIG, "allocation": "uniform"}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def one_shot_errs(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have one shot be measured with this error: a large one keeps the rounds, 0 does not."""

    def pretend(error: float) -> None:
        monkeypatch.setattr(rounds_, "measured_error", lambda *_: error)

    return pretend


@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize("metric", ["params", "macs"])
def test_rounds_meet_the_budget_from_the_dense_model(
    metric: str, rounds: int, tmp_path: Path, one_shot_errs: Callable[[float], None]
) -> None:
    one_shot_errs(1e9)
    pipe, dense = tiny_pipeline(), tiny_pipeline().unet
    unet, stages = pipe.unet, []
    plan = slimdiff.compress(
        pipe,
        PROMPTS,
        slimdiff.Budget(**{metric: 0.8}),
        rounds=rounds,
        checkpoint=tmp_path / "s",
        results=tmp_path / "results.json",
        pictures=0,
        progress=lambda stage, *_: stages.append(stage),
        **UNIFORM,
    )
    assert pipe.unet is unet and plan is unet.slim_record.plan
    assert plan.figures[metric] <= 0.8 * plan.figures[f"{metric}_dense"]
    assert plan.figures["params_dense"] == parameters(dense)
    assert plan.figures["params"] == parameters(unet)
    assert plan.budget == f"--{metric} 0.8" and plan.denoiser == "UNet2DConditionModel"
    told = plan.figures["rounds"]
    assert (told["asked"], told["kept"]) == (rounds, True)
    assert told["error"] == plan.figures["error_on_probes"] > 0
    plan.check(slimdiff.groups_of(dense))
    for group in slimdiff.groups_of(unet):
        assert plan.entries[group.name].width == group.width
    assert {f"calibrate, round {n}" for n in range(2, rounds + 1)} <= set(stages)
    folders = sorted(path.name for path in (tmp_path / "s").glob("round-*"))
    assert folders == [f"round-{n}" for n in range(2, rounds + 1)]
    assert set(plan.figures["seconds"]) == {"calibrate", "allocate", "rewrite"}
    slimdiff.save_pipeline(pipe, tmp_path / "slim")
    loaded = slimdiff.load_pipeline(tmp_path / "slim")
    assert torch.equal(*(image(p, output_type="latent") for p in (pipe, loaded)))


def test_what_is_no_better_is_not_kept(
    caplog: pytest.LogCaptureFixture, one_shot_errs: Callable[[float], None]
) -> None:
    """The outcome is that of one shot, to the bit, in the same module."""
    one_shot_errs(0.0)
    budget = slimdiff.Budget(params=0.85)
    plain, pipe = tiny_pipeline(), tiny_pipeline()
    unet = pipe.unet
    wanted = slimdiff.compress(plain, PROMPTS, budget, config=CONFIG)
    plan = slimdiff.compress(pipe, PROMPTS, budget, rounds=2, config=CONFIG)
    assert "the result is that of one shot" in caplog.text
    assert plan.entries == wanted.entries and plan.budget == wanted.budget
    assert plan.figures["rounds"]["kept"] is False
    assert plan.figures["error_on_probes"] == wanted.figures["error_on_probes"]
    assert pipe.unet is unet and unet.slim_record.plan is plan
    a, b = plain.unet.state_dict(), unet.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    maps = plain.unet.slim_record.maps
    assert all(torch.equal(maps[name], value) for name, value in unet.slim_record.maps.items())


def test_the_error_of_one_shot_is_what_it_would_have_been() -> None:
    budget = slimdiff.Budget(params=0.85)
    plain, pipe = tiny_pipeline(), tiny_pipeline()
    alone = slimdiff.compress(plain, PROMPTS, budget, config=CONFIG).figures["error_on_probes"]
    told = slimdiff.compress(pipe, PROMPTS, budget, rounds=2, config=CONFIG).figures["rounds"]
    assert told["error_one_shot"] == pytest.approx(alone, rel=1e-3)
    assert told["kept"] == (told["error"] < told["error_one_shot"])


def test_later_rounds_resume_and_forget_another_halfway_model(
    tmp_path: Path, one_shot_errs: Callable[[float], None]
) -> None:
    one_shot_errs(1e9)
    file = tmp_path / "round-2" / WEIGHTS_FILE

    def compress(share: float) -> list[str]:
        stages: list[str] = []
        how: dict[str, Any] = {"rounds": 2, "checkpoint": tmp_path, **UNIFORM}
        how["progress"] = lambda stage, *_: stages.append(stage)
        slimdiff.compress(tiny_pipeline(), PROMPTS, slimdiff.Budget(params=share), **how)
        return [stage for stage in dict.fromkeys(stages) if stage.startswith("calibrate")]

    assert compress(0.9) == ["calibrate", "calibrate, round 2"]
    written = file.stat().st_mtime_ns
    assert compress(0.9) == [] and file.stat().st_mtime_ns == written
    assert compress(0.8) == ["calibrate, round 2"] and file.stat().st_mtime_ns != written


def test_rounds_of_a_slim_model(one_shot_errs: Callable[[float], None]) -> None:
    one_shot_errs(1e9)
    pipe, dense = tiny_pipeline(), parameters(tiny_pipeline().unet)
    first = slimdiff.compress(pipe, PROMPTS, slimdiff.Budget(params=0.9), **UNIFORM)
    second = slimdiff.compress(pipe, PROMPTS, slimdiff.Budget(params=0.9), rounds=2, **UNIFORM)
    record = pipe.unet.slim_record
    assert second.figures["params_dense"] == first.figures["params"]
    assert record.plan.figures["params_dense"] == dense
    assert record.plan.figures["params"] == second.figures["params"] == parameters(pipe.unet)
    assert record.plan.budget == "--params 0.9, then --params 0.9"


def test_text_encoders_go_in_rounds_too(one_shot_errs: Callable[[float], None]) -> None:
    one_shot_errs(1e9)
    pipe, budget = tiny_pipeline(), slimdiff.Budget(params=0.8)
    how: dict[str, Any] = {"component": "text_encoder", "rounds": 2, **UNIFORM}
    plan = slimdiff.compress(pipe, PROMPTS, budget, **how)
    assert parameters(pipe.text_encoder) == plan.figures["params"]
    assert plan.figures["params"] <= 0.8 * plan.figures["params_dense"]


def test_speedups_multiply(
    monkeypatch: pytest.MonkeyPatch, one_shot_errs: Callable[[float], None]
) -> None:
    """Each round is to be the root of the whole; what the first missed, the second makes up."""
    one_shot_errs(1e9)
    asked: list[float] = []
    real = rounds_.allocate

    def allocate(denoiser: nn.Module, statistics: Any, budget: Any, **how: Any) -> slimdiff.Plan:
        asked.append(budget.speedup)
        plan = real(denoiser, statistics, slimdiff.Budget(params=0.9), **how)
        found = {"dense": 1.0, "slim": 0.5, "speedup": 1.5, "wanted": budget.speedup}
        return replace(plan, figures=plan.figures | {"latency": found})

    def one_shot(*args: Any, **how: Any) -> slimdiff.Plan:
        plan = allocate(*args, **how)
        plan.figures["latency"]["wanted"] = 4.0
        return plan

    monkeypatch.setattr(rounds_, "allocate", allocate)
    monkeypatch.setattr("slimdiff.pipeline.allocate", one_shot)
    plan = slimdiff.compress(
        tiny_pipeline(), PROMPTS, slimdiff.Budget(speedup=4), rounds=2, **UNIFORM
    )
    assert asked == [4, 2.0, pytest.approx(4 / 1.5)]
    assert plan.figures["latency"] == {"dense": 1.0, "slim": 0.5, "speedup": 2.25, "wanted": 4.0}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"rounds": 0, "budget": slimdiff.Budget(params=0.9)}, "rounds is 0, expected at least 1"),
        ({"rounds": 2, "budget": slimdiff.Budget(quality=1e-3)}, "quality .* how much is to go"),
        ({"rounds": 2, "plan": slimdiff.Plan("x", "slimdiff", {})}, "a plan has all widths"),
        (
            {"rounds": 2, "budget": slimdiff.Budget(params=0.9), "recipe": "magnitude"},
            "recipe magnitude has no error curves",
        ),
    ],
)
def test_what_cannot_go_in_rounds_is_refused_at_once(how: dict[str, Any], words: str) -> None:
    pipe, calls = tiny_pipeline(), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(slimdiff.SlimdiffError, match=words):
        slimdiff.compress(pipe, PROMPTS, config=CONFIG, **how)
    assert not calls


def test_a_module_is_put_back_in_place() -> None:
    pipe = tiny_pipeline()
    unet, before = pipe.unet, image(pipe)
    kept = on_cpu(unet)
    assert not {p.data_ptr() for p in unet.parameters()} & {p.data_ptr() for p in kept.parameters()}
    slimdiff.compress(pipe, PROMPTS, slimdiff.Budget(params=0.9), **UNIFORM)
    put_back_(unet, kept, "cpu")
    assert type(unet).__name__ == "UNet2DConditionModel" and not hasattr(unet, "slim_record")
    assert (image(pipe) == before).all()
