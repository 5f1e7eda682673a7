"""Healing: the dense denoiser teaches the slim one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slimdiff
from slimdiff.errors import SlimdiffError
from slimdiff.evaluate.velocity import velocity_error
from slimdiff.healing import student as student_
from slimdiff.healing.student import Student
from slimdiff.healing.teacher import split
from tiny_pipeline import slim_by_hand, tiny_pipeline

PROMPTS = [f"a {colour} {thing}" for colour in ("red", "tan") for thing in ("cat", "sun", "sea")]
SAMPLING = slimdiff.CalibrationConfig(num_inference_steps=2, guidance_scale=3.0)
HOW: dict[str, Any] = {"batch_size": 8, "round_prompts": 2, "reuse": 2, "precision": "float32"}
CONFIG = slimdiff.HealConfig(**HOW, learning_rate=1e-3, warmup_steps=2, save_seconds=0)


class Interrupted(Exception):
    """Ends a run from outside."""


@pytest.fixture(scope="module")
def dense() -> Any:
    return tiny_pipeline()


def damaged(pipe: Any, share: float = 0.1) -> nn.Module:
    """A copy of the denoiser whose weights are off by a share of their size."""
    slim = copy.deepcopy(pipe.unet)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in slim.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += share * parameter.square().mean().sqrt() * noise
    return slim


def healed(pipe: Any, slim: nn.Module, **how: Any) -> slimdiff.HealResult:
    given = {"steps": 6, "sampling": SAMPLING, "config": CONFIG} | how
    return slimdiff.heal(pipe, slim, PROMPTS, **given)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_it_lowers_the_error_that_an_evaluation_measures(dense: Any) -> None:
    before, slim = weights(dense.unet), damaged(dense)
    held_out = split(PROMPTS, CONFIG.seed)[1]
    how: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}
    errors = [velocity_error(dense, slim, held_out, **how).relative]
    result = healed(dense, slim)
    errors.append(velocity_error(dense, slim, held_out, **how).relative)
    assert (result.before, result.after) == pytest.approx(errors, rel=1e-4)
    assert errors[1] < 0.95 * errors[0]
    assert (result.steps, result.stopped, result.held_out, result.prompts) == (6, "steps", 1, 5)
    assert equal(weights(dense.unet), before), "the dense denoiser is not trained"
    assert all(p.requires_grad and p.grad is None for p in dense.unet.parameters())


def test_an_interrupted_run_ends_as_one_that_was_not(dense: Any, tmp_path: Path) -> None:
    slims = [damaged(dense) for _ in range(3)]
    whole = healed(dense, slims[0])

    def interrupt(_stage: str, done: int, _all: int) -> None:
        if done == 5:  # in the third round of two steps
            raise Interrupted

    with pytest.raises(Interrupted):
        healed(dense, slims[1], checkpoint=tmp_path, progress=interrupt)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    counted: list[int] = []
    again = healed(
        dense, slims[2], checkpoint=tmp_path, progress=lambda _, done, __: counted.append(done)
    )
    assert counted[0] == 0 and 1 not in counted, "the first rounds are not trained again"
    assert again.history == whole.history and again.after == whole.after
    assert equal(weights(slims[2]), weights(slims[0]))
    done = damaged(dense)
    assert healed(dense, done, checkpoint=tmp_path) == again, "what is finished is taken up"
    assert equal(weights(done), weights(slims[0]))


def test_another_way_to_heal_leaves_a_checkpoint_alone(dense: Any, tmp_path: Path) -> None:
    healed(dense, damaged(dense), steps=1, checkpoint=tmp_path)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    healed(dense, damaged(dense), steps=2, checkpoint=tmp_path)
    assert len(kept) == 1 and len(list(tmp_path.iterdir())) == 2
    assert all(path.read_bytes() == content for path, content in kept.items())
    other = healed(dense, damaged(dense, 0.2), steps=1, checkpoint=tmp_path)
    assert other.before > other.after, "the checkpoint of a denoiser with another error is not used"
    assert len(list(tmp_path.iterdir())) == 3, "other weights have a file of their own"


def test_it_keeps_what_it_came_with_where_nothing_is_better(dense: Any) -> None:
    slim = damaged(dense)
    before = weights(slim)
    result = healed(dense, slim, config=slimdiff.HealConfig(**HOW, learning_rate=1e9))
    assert result.after == result.before and equal(weights(slim), before)
    assert result.history[-1][1] > result.before or result.stopped == "not finite"


def test_it_stops_when_the_error_no_longer_falls(dense: Any) -> None:
    config = slimdiff.HealConfig(**(HOW | {"reuse": 0.5}), learning_rate=1e-12, patience=2)
    result = healed(dense, damaged(dense), config=config, steps=100)
    assert result.stopped == "no longer falling" and len(result.history) == 3


def test_a_slim_denoiser_keeps_its_shapes_dtype_and_flags(dense: Any) -> None:
    slim = slim_by_hand(tiny_pipeline()).unet.to(torch.bfloat16).requires_grad_(False)
    shapes = {name: (t.shape, t.dtype) for name, t in slim.state_dict().items()}
    before = weights(slim)
    result = healed(dense, slim, config=slimdiff.HealConfig(**HOW, learning_rate=1e-2))
    assert {name: (t.shape, t.dtype) for name, t in slim.state_dict().items()} == shapes
    assert not any(p.requires_grad for p in slim.parameters()) and not slim.training
    assert result.after < result.before
    trained = {
        name for name, value in weights(slim).items() if not torch.equal(value, before[name])
    }
    kinds = {name.rpartition(".")[2] for name in trained}
    assert {"constant", "weight", "bias"} <= kinds, "constants, norms and biases are trained too"
    assert slim.config["slimdiff"]["healed"] == {"steps": 6}
    assert slim.slim_record.plan.figures["healed"]["after"] == result.after


def test_bfloat16_is_for_errors_that_hide_its_rounding(
    dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student_, "has_fast_bfloat16", lambda _device: True)

    def precision(share: float, asked: str) -> str:
        config = slimdiff.HealConfig(**(HOW | {"precision": asked}))
        return healed(dense, damaged(dense, share), steps=1, config=config).precision

    assert precision(0.2, "auto") == "bfloat16"
    assert precision(1e-3, "auto") == "float32"
    assert precision(1e-3, "bfloat16") == "bfloat16"


def test_a_step_in_parts_is_the_step_at_once(dense: Any) -> None:
    """Gradients of parts of a batch add up to those of the batch."""
    batches: list[Any] = []
    generator = torch.Generator().manual_seed(0)
    for rows in (6, 2, 4):
        call = {
            "sample": torch.randn(rows, 4, 16, 16, generator=generator),
            "timestep": torch.full((rows,), 500),
            "encoder_hidden_states": torch.randn(rows, 16, 24, generator=generator),
        }
        target = torch.randn(rows, 4, 16, 16, generator=generator)
        batches.append((call, target))
    joined = {name: torch.cat([call[name] for call, _ in batches[1:]]) for name in batches[0][0]}
    parts = {"at once": [(joined, torch.cat([y for _, y in batches[1:]]))], "apart": batches[1:]}
    found = {}
    for name, given in parts.items():
        slim = damaged(dense)
        with Student(slim, CONFIG) as student:
            assert student.step(given, energy=1.0, rate=1e-3)
            assert student.keep()
        found[name] = weights(slim)
    for name, value in found["apart"].items():
        torch.testing.assert_close(value, found["at once"][name], rtol=0, atol=2e-4)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no limit": ({"steps": None}, "give minutes to heal for, or steps"),
    "no minutes": ({"minutes": -1.0}, "must be positive, got -1.0"),
    "no steps": ({"steps": 0}, "at least 1, got 0"),
    "no judges": ({"held_out": []}, "held_out is \\[\\], expected a list"),
    "one string": ({"held_out": "a cat"}, "held_out is 'a cat', expected a list"),
    "seen judges": ({"held_out": ["a red cat"]}, "'a red cat' is trained on and held out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(dense: Any, case: str) -> None:
    how, message = BAD[case]
    with pytest.raises(SlimdiffError, match=message):
        healed(dense, damaged(dense), **how)


def test_bad_models_and_prompts(dense: Any) -> None:
    with pytest.raises(SlimdiffError, match="the dense one itself"):
        healed(dense, dense.unet)
    with pytest.raises(SlimdiffError, match="got 1 distinct prompts"):
        slimdiff.heal(dense, damaged(dense), ["a cat", "a cat"], steps=1)
    broken = damaged(dense)
    next(broken.parameters()).data.fill_(float("nan"))
    with pytest.raises(SlimdiffError, match="the error before healing is nan"):
        healed(dense, broken)
    with pytest.raises(SlimdiffError, match="batch_size must be at least 1, got 0"):
        slimdiff.HealConfig(batch_size=0)
    with pytest.raises(SlimdiffError, match="learning_rate must be positive, got nan"):
        slimdiff.HealConfig(learning_rate=float("nan"))
    with pytest.raises(SlimdiffError, match="precision is 'float8', expected one of auto"):
        slimdiff.HealConfig(precision="float8")  # type: ignore[arg-type]  # the point
