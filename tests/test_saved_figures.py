"""Figures are of the weights that are saved: rounded to the dtypes that they have on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slimdiff
from slimdiff.budget import Saving
from slimdiff.healing.student import Student
from slimdiff.held_out import HeldOut
from slimdiff.statistics import Statistics
from test_cli import shell
from tiny_pipeline import tiny_pipeline

PROMPTS = [f"a {kind} number {i}" for i in range(4) for kind in ("cat", "tram", "dog", "hill")]
CONFIG = slimdiff.CalibrationConfig(num_inference_steps=2, batch_size=4, num_probes=4)


def half(pipe: Any) -> dict[str, torch.dtype]:
    """Round the denoiser to bfloat16, but for its norms, in place; the dtypes to save it in."""
    dtypes = {}
    for name, tensor in pipe.unet.state_dict().items():
        dtypes[name] = torch.float32 if "norm" in name else torch.bfloat16
        tensor.copy_(tensor.to(dtypes[name]))
    return dtypes


def error_of(slim: nn.Module, dense: nn.Module, statistics: Statistics) -> float:
    """The error on the probes that were kept, of any two denoisers."""
    measuring = HeldOut(dense, statistics)
    measuring.judging.denoiser = slim
    return measuring.judging.measure({}, guided=False).error


@pytest.mark.parametrize("finish", ["rewrite", "refit", "heal"])
def test_errors_are_of_rounded_weights(finish: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    saving = Saving(half(pipe))
    dense = copy.deepcopy(pipe.unet)
    more: dict[str, Any] = {"refit": finish == "refit", "heal": 0.05 if finish == "heal" else None}
    plan = slimdiff.compress(
        *(pipe, PROMPTS, slimdiff.Budget(params=0.9)),
        **more,
        config=CONFIG,
        saving=saving,
        checkpoint=tmp_path,
        layers=["attention", "feed_forward"],
    )
    kinds = {"norm": torch.float32}
    for name, parameter in pipe.unet.named_parameters():
        kind = kinds.get("norm" if "norm" in name else "", torch.bfloat16)
        assert torch.equal(parameter, parameter.to(kind).float()), f"{name} is as it is saved"
    told = plan.figures["healed"] if finish == "heal" else plan.figures
    error = error_of(pipe.unet, dense, Statistics.load(tmp_path))
    assert told["error_on_probes"] == pytest.approx(error, rel=1e-9)


def test_the_command_states_the_error_of_the_folder_that_it_wrote(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    half(pipe)
    pipe.unet.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "dense")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:4]))
    done = shell(
        *("compress", "dense", "--prompts", "prompts.txt", "--params", "0.97", "--keep-layers"),
        *("--layers", "attention", "--steps", "2", "--num-probes", "4", "--no-report"),
        *("-o", "slim"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    dense, slim = (
        slimdiff.load_pipeline(tmp_path / name, torch_dtype=torch.float32).unet
        for name in ("dense", "slim")
    )
    figures = json.loads((tmp_path / "slim" / "unet" / "slimdiff.json").read_text())["figures"]
    statistics = Statistics.load(tmp_path / "slim.statistics")
    error = error_of(slim, dense, statistics)
    assert figures["error_on_probes"] == pytest.approx(error, rel=1e-9)


def test_a_quality_that_rounded_weights_miss_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_pipeline()
    coarse = Saving(dict.fromkeys(half(pipe), torch.float8_e4m3fn))
    how: dict[str, Any] = {"config": CONFIG, "layers": ["feed_forward"], "remove_layers": False}
    for saving in (None, coarse):
        assert "of the budget" not in caplog.text
        budget = slimdiff.Budget(quality="1e-4")
        plan = slimdiff.compress(copy.deepcopy(pipe), PROMPTS[:4], budget, **how, saving=saving)
    assert plan.figures["error_on_probes"] > 1e-4
    assert "more than the 1.0e-04 of the budget" in caplog.text


def test_healing_judges_what_the_denoiser_will_hold() -> None:
    dense = tiny_pipeline()
    slim = copy.deepcopy(dense.unet)
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape) * parameter.square().mean().sqrt())
    config = slimdiff.HealConfig(batch_size=4, round_prompts=2, precision="float32")
    saving = Saving({name: torch.bfloat16 for name in slim.state_dict()})
    held_out = PROMPTS[:2]
    result = slimdiff.heal(
        *(dense, slim, PROMPTS[2:8]),
        steps=4,
        held_out=held_out,
        sampling=CONFIG,
        config=config,
        saving=saving,
    )
    assert all(torch.equal(p, p.bfloat16().float()) for p in slim.parameters())
    assert result.after < result.before


def test_masters_are_rounded_for_a_while() -> None:
    unet = tiny_pipeline().unet
    with Student(
        unet, slimdiff.HealConfig(), dict.fromkeys(unet.state_dict(), torch.bfloat16)
    ) as s:
        before = {name: p.detach().clone() for name, p in s.parameters.items()}
        with s.rounded():
            assert all(
                torch.equal(p, before[n].bfloat16().float()) for n, p in s.parameters.items()
            )
        assert all(torch.equal(p, before[n]) for n, p in s.parameters.items())
