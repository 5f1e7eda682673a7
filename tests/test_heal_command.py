"""Healing as a part of compression: from the command line, and on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import slimdiff
from slimdiff.composition import composed_plan
from slimdiff.report.facts import plan_facts
from test_cli import shell
from tiny_pipeline import slim_by_hand, tiny_pipeline

PROMPTS = ["a cat", "a dog", "the sea", "a tram"]
SAMPLING = slimdiff.CalibrationConfig(num_inference_steps=1, guidance_scale=1.0)


def healed_by_hand() -> Any:
    """A slim pipeline after two steps of healing."""
    dense, slim = tiny_pipeline(), slim_by_hand(tiny_pipeline())
    how: dict[str, Any] = {"batch_size": 4, "precision": "float32", "learning_rate": 1e-4}
    config = slimdiff.HealConfig(**how, warmup_steps=0)
    result = slimdiff.heal(dense, slim, PROMPTS, steps=2, sampling=SAMPLING, config=config)
    assert result.after < result.before
    return slim


def test_the_command_heals_and_says_so(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    done = shell(
        *("compress", "tiny", "--prompts", "prompts.txt", "--params", "0.8", "--heal", "0.03"),
        *("--allocation", "uniform", "--steps", "1", "--pictures", "0", "--num-probes", "2"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "healing: error on held-out prompts" in told and "steps, ended by time" in told
    assert "seconds to heal" in told
    pipe = slimdiff.load_pipeline(tmp_path / "tiny-slim")
    healed = pipe.unet.slim_record.plan.figures["healed"]
    assert healed["after"] <= healed["before"] and (healed["prompts"], healed["held_out"]) == (3, 1)
    trained = pipe.unet.config["slimdiff"].get("healed")
    assert trained == ({"steps": healed["steps"]} if healed["after"] < healed["before"] else None)
    card = (tmp_path / "tiny-slim" / "README.md").read_text()
    assert f"{healed['before']:.2e} to {healed['after']:.2e}" in card
    assert ("and then healed" in card) == bool(trained) == ("without training" not in card)


def test_a_healed_folder_says_so_and_loads_in_diffusers(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    slim = healed_by_hand()
    slimdiff.save_pipeline(slim, tmp_path / "slim")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "slim", trust_remote_code=True)
    assert loaded.unet.config["slimdiff"]["healed"] == {"steps": 2}
    ours = slimdiff.load_pipeline(tmp_path / "slim")
    for key, tensor in slim.unet.state_dict().items():
        assert bool((ours.unet.state_dict()[key] == tensor).all()), key
    card = (tmp_path / "slim" / "README.md").read_text()
    assert "and then healed: trained to predict" in card and "without training" not in card
    assert "as they were before healing" in card
    results = {"plan": {"figures": slim.unet.slim_record.plan.figures}}
    facts = plan_facts(results)
    assert facts["velocity error on held-out prompts, before healing"] == "1.0e-5"
    assert "healing: error on held-out prompts" in facts


def test_what_was_healed_once_stays_so(tmp_path: Path) -> None:
    slim = healed_by_hand()
    first = slim.unet.slim_record.plan
    budget, how = slimdiff.Budget(params=0.9), {"allocation": "uniform", "config": SAMPLING}
    plan = slimdiff.compress(slim, PROMPTS, budget, **how)
    assert slim.unet.config["slimdiff"]["healed"] == {"steps": 2}
    assert "healed" not in plan.figures and "healed" not in composed_plan(first, plan).figures
    slimdiff.save_pipeline(slim, tmp_path / "slim")
    card = (tmp_path / "slim" / "README.md").read_text()
    assert "and then healed: trained to predict" in card and "before healing" in card


def test_compress_heals_on_its_own_prompts(tmp_path: Path) -> None:
    """The pipeline has its slim denoiser afterwards; the figures tell both errors."""
    pipe = tiny_pipeline()
    unet = pipe.unet
    before = copy.deepcopy(unet.state_dict())
    plan = slimdiff.compress(
        *(pipe, PROMPTS, slimdiff.Budget(params=0.7)),
        **{"allocation": "uniform", "config": SAMPLING, "heal": 0.02, "checkpoint": tmp_path},
    )
    assert pipe.unet is unet and type(unet).__name__ == "SlimUNet2DConditionModel"
    assert before.keys() - unet.state_dict().keys() == set()
    healed = plan.figures["healed"]
    assert healed["after"] <= healed["before"] and healed["error_on_probes"] > 0
    assert plan.figures["seconds"]["heal"] > 0
    assert unet.slim_record.plan.figures["healed"] == healed
    assert len(list(tmp_path.glob("heal-*.safetensors"))) == 1


def test_bad_minutes_are_refused_before_anything_runs() -> None:
    pipe, budget = tiny_pipeline(), slimdiff.Budget(params=0.9)
    for how, message in (
        ({"heal": 0.0}, "must be positive, got 0.0"),
        ({"heal": 1.0, "component": "text_encoder"}, "healing is for denoisers"),
    ):
        with pytest.raises(slimdiff.SlimdiffError, match=message):
            slimdiff.compress(pipe, PROMPTS, budget, **how)
    with pytest.raises(slimdiff.SlimdiffError, match="got 1 distinct prompts"):
        slimdiff.compress(pipe, PROMPTS[:1], budget, heal=1.0)
