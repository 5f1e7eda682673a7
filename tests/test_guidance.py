"""What guidance and ranks ask of a slim model: self-attention to perturb, heads that divide."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

import slimdiff
from tiny_models import TINY_MODELS
from tiny_pipeline import tiny_pipeline

CONFIG = slimdiff.CalibrationConfig(num_inference_steps=2, num_probes=4, batch_size=2)
PROMPTS = ["a red circle", "a blue square"]
MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


def slimmed(*, tied: bool = True, gone: str | None = None) -> Any:
    pipe = tiny_pipeline()
    statistics = slimdiff.calibrate(pipe, PROMPTS, CONFIG)
    budget = slimdiff.Budget(params=0.85)
    plan = slimdiff.allocate(pipe.unet, statistics, budget, tied=tied, remove_layers=False)
    if gone is not None:
        own = {name for name in plan.entries if name.startswith(f"{gone}.")}
        entries = plan.entries | {name: replace(plan.entries[name], width=0) for name in own}
        plan = replace(plan, entries=entries)
    slimdiff.rewrite(pipe.unet, statistics, plan)
    return pipe


def effect(pipe: Any) -> float:
    """What perturbed attention guidance changes of the latents, relative to them."""
    from diffusers import StableDiffusionPAGPipeline

    guided = StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False)
    guided.set_progress_bar_config(disable=True)
    without, with_ = (
        guided(
            PROMPTS[0],
            num_inference_steps=2,
            output_type="latent",
            pag_scale=scale,
            generator=torch.Generator().manual_seed(0),
        ).images
        for scale in (0.0, 3.0)
    )
    return float((with_ - without).norm() / without.norm())


@pytest.mark.filterwarnings("ignore")
def test_perturbed_attention_acts_on_tied_and_untied_layers() -> None:
    dense, tied, untied = (effect(p) for p in (tiny_pipeline(), slimmed(), slimmed(tied=False)))
    assert dense > 1e-3
    assert tied == pytest.approx(dense, rel=0.5) and untied == pytest.approx(dense, rel=0.5)


@pytest.mark.filterwarnings("ignore")
def test_removed_self_attention_is_told_and_not_perturbed_in_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        pipe = slimmed(gone=MID)
    assert f"1 self-attention layers were removed ({MID})" in caplog.text
    with pytest.raises(ValueError, match="Cannot find PAG layer"):
        effect(pipe)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        slimmed()
    assert "self-attention" not in caplog.text


def heads_of(plan: slimdiff.Plan) -> set[int]:
    return {entry.heads for entry in plan.entries.values() if entry.kind == "value_output"}


@pytest.mark.filterwarnings("ignore")
def test_as_many_heads_stay_as_the_ranks_divide() -> None:
    from diffusers import UNet2DConditionModel

    model, calls = TINY_MODELS["sd1"]()
    torch.manual_seed(0)
    model = UNet2DConditionModel.from_config({**model.config, "attention_head_dim": 8}).eval()
    with slimdiff.record(model, num_probes=4) as statistics:
        for call in calls:
            model(**call)
    budget = slimdiff.Budget(params=0.88)
    how: dict[str, Any] = {"recipe": "magnitude", "remove_layers": False}
    free = heads_of(slimdiff.allocate(model, statistics, budget, **how))
    fours = heads_of(slimdiff.allocate(model, statistics, budget, **how, head_multiple=4))
    assert free - {4, 8} and fours and fours <= {4, 8}


@pytest.mark.filterwarnings("ignore")
def test_compress_keeps_heads_that_divide() -> None:
    pipe = tiny_pipeline()
    heads = {module.heads for module in pipe.unet.modules() if hasattr(module, "to_q")}
    budget = slimdiff.Budget(params=0.9)
    plan = slimdiff.compress(
        pipe, PROMPTS, budget, recipe="magnitude", head_multiple=max(heads), config=CONFIG
    )
    assert heads_of(plan) == heads
