"""The bundled transformer from the command line, and its slim folder in plain diffusers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import slimdiff
from slimdiff.reference.bundled import load_reference
from test_cli import shell

CHILD = """
import sys
sys.modules["slimdiff"] = None
from diffusers import DiffusionPipeline
pipe = {call}
pipe.set_progress_bar_config(disable=True)
from safetensors.torch import save_file
import torch
options = dict(num_inference_steps=2, max_sequence_length=1, output_type="latent")
generator = torch.Generator().manual_seed(0)
latents = pipe("a small red ring on navy background", generator=generator, **options).images
save_file({{"latents": latents.contiguous()}}, "latents.safetensors")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("made")
    quick = ("--steps", 2, "--num-prompts", 4, "--allocation", "uniform", "--no-report")
    arguments = ("compress", "scenes-dit", "--params", "0.8", *quick, "-o", "slim")
    return folder, shell(*arguments, cwd=folder)


def latents_of(pipe: Any) -> torch.Tensor:
    options: dict[str, Any] = {"num_inference_steps": 2, "max_sequence_length": 1}
    generator = torch.Generator().manual_seed(0)
    prompt = "a small red ring on navy background"
    found: torch.Tensor = pipe(prompt, generator=generator, output_type="latent", **options).images
    return found


def test_the_printed_call_loads_it_without_slimdiff(made: tuple[Path, Any]) -> None:
    folder, done = made
    assert done.returncode == 0, done.stderr
    found = re.search(r"pipe = (DiffusionPipeline.*)", done.stdout)
    assert found is not None and "text_encoder_3=None" in found[1]
    assert found[1] in (folder / "slim" / "README.md").read_text()
    child = [sys.executable, "-c", CHILD.format(call=found[1])]
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(child, cwd=folder, env=settings, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    from safetensors.torch import load_file

    plain = load_file(folder / "latents.safetensors")["latents"]
    pipe = slimdiff.load_pipeline(folder / "slim")
    assert type(pipe.transformer).__name__ == "SlimSD3Transformer2DModel"
    assert torch.allclose(plain, latents_of(pipe), atol=1e-4)


def test_it_is_smaller_and_close(made: tuple[Path, Any]) -> None:
    folder, _ = made
    slim, dense = slimdiff.load_pipeline(folder / "slim"), load_reference("scenes-dit")
    sizes = [sum(p.numel() for p in pipe.transformer.parameters()) for pipe in (slim, dense)]
    assert 0.79 * sizes[1] < sizes[0] <= 0.8 * sizes[1]
    there, wanted = latents_of(slim), latents_of(dense)
    # two steps of four prompts are little to calibrate on, but unlike weights would be at 1 or more
    assert float((there - wanted).square().sum() / wanted.square().sum()) < 0.05


def test_calibration_used_the_reference_s_own_sampling(made: tuple[Path, Any]) -> None:
    slim = slimdiff.load_pipeline(made[0] / "slim").transformer
    config = slim.slim_record.plan.figures["calibration"]["config"]
    assert (config["guidance_scale"], config["max_sequence_length"]) == (3.0, 1)
