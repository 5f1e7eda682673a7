"""Digests of models: what changes them, what does not, and what calibration makes of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import slimdiff
from slimdiff.checksums import tensors_digest, weights_digest
from slimdiff.config import RECIPES
from slimdiff.curve_file import CurveFile
from slimdiff.digest import differences, model_digest
from slimdiff.probes import Probes
from slimdiff.resuming import EARLIER_FILE
from slimdiff.statistics import Statistics
from tiny_pipeline import _text_encoder, _tokenizer, image, tiny_pipeline, tiny_sd3_pipeline

CONFIG = slimdiff.CalibrationConfig(num_inference_steps=2, batch_size=1, num_probes=2)
PROMPTS = ["a red circle", "a blue square"]
LAST = "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2.weight"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1025, 1030), (0, 4)])
def test_any_change_of_a_tensor_changes_its_digest(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(shape) * 50).to(dtype)
    before = tensors_digest({"a": tensor})
    assert tensors_digest({"a": tensor.clone()}) == before
    assert tensors_digest({"b": tensor}) != before
    assert tensors_digest({"a": tensor[None]}) != before
    for place in (0, -1) if tensor.numel() else ():
        other = tensor.clone()
        other.view(-1)[place] += 1
        assert tensors_digest({"a": other}) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moved_and_negated_numbers_change_a_digest(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(64, 32).to(dtype)
    found = {tensors_digest({"a": tensor}), tensors_digest({"a": -tensor})}
    found.add(tensors_digest({"a": tensor.flip(0)}))
    for rows in ((0, 1), (2, 3), (0, 5)):
        other = tensor.clone()
        other[list(rows)] *= -1
        found.add(tensors_digest({"a": other}))
        other = tensor.clone()
        other[list(rows)] = tensor[list(reversed(rows))]
        found.add(tensors_digest({"a": other}))
    assert len(found) == 9


def test_layout_and_offset_do_not_matter() -> None:
    tensor = torch.randn(2, 3, 8, 8, dtype=torch.float32)
    padded = torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    last = tensor.to(memory_format=torch.channels_last)
    assert len({tensors_digest({"a": t}) for t in (tensor, padded, last)}) == 1


def changed_weight(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.get_parameter(LAST)[0, 0] += 1e-3


def changed_encoder(pipe: Any) -> None:
    torch.manual_seed(77)
    pipe.text_encoder = _text_encoder()


def changed_tokenizer(pipe: Any) -> None:
    pipe.tokenizer = _tokenizer()
    pipe.tokenizer.add_tokens(["<cat-toy>"])


def changed_noise(pipe: Any) -> None:
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod * 0.99


def changed_scale(pipe: Any) -> None:
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.scale *= 2


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "weight": (changed_weight, "weights of unet differ"),
    "encoder": (changed_encoder, "weights of text_encoder differ"),
    "tokenizer": (changed_tokenizer, "tokenizer differs"),
    "scheduler": (
        lambda p: setattr(p, "scheduler", diffusers.EulerDiscreteScheduler()),
        "the scheduler differs: DDIMScheduler, not EulerDiscreteScheduler",
    ),
    "scheduler's config": (
        lambda p: p.scheduler.register_to_config(timestep_spacing="trailing"),
        "the scheduler differs: timestep_spacing leading, not trailing",
    ),
    "noise levels": (changed_noise, "the scheduler differs: noise levels"),
    "scale": (changed_scale, "settings of unet differ: numbers in its modules"),
    "FreeU": (
        lambda p: p.enable_freeu(0.9, 0.2, 1.2, 1.4),
        "settings of unet differ: numbers in its modules",
    ),
    "config": (
        lambda p: p.unet.register_to_config(flip_sin_to_cos=False),
        "settings of unet differ: flip_sin_to_cos",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_named(change: str) -> None:
    pipe = tiny_pipeline()
    before = model_digest(pipe)
    assert before == json.loads(json.dumps(before))
    CHANGES[change][0](pipe)
    assert differences(before, model_digest(pipe)) == [CHANGES[change][1]]


def test_another_pipeline_class_is_named(pipe: Any) -> None:
    other = diffusers.StableDiffusionPAGPipeline(
        **pipe.components | {"image_encoder": None}, requires_safety_checker=False
    )
    found = differences(model_digest(pipe), model_digest(other))
    assert found == [
        "the pipeline differs: StableDiffusionPipeline, not StableDiffusionPAGPipeline"
    ]


SCHEDULERS = (
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "UniPCMultistepScheduler",
    "DDPMScheduler",
)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_running_and_saving_a_pipeline_change_no_digest(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    before = model_digest(pipe)
    image(pipe, output_type="latent")
    assert model_digest(pipe) == before
    pipe.save_pretrained(tmp_path / "there")
    loaded = slimdiff.load_pipeline(tmp_path / "there")
    assert differences(before, model_digest(loaded)) == []


def test_several_encoders_of_a_loaded_pipeline(tmp_path: Path) -> None:
    pipe = tiny_sd3_pipeline()
    before = model_digest(pipe)
    assert set(before["weights"]) == {
        *("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"),
    }
    pipe.save_pretrained(tmp_path / "there")
    loaded = slimdiff.load_pipeline(tmp_path / "there")
    assert differences(before, model_digest(loaded)) == []
    encoder = model_digest(pipe, "text_encoder_2")
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(1)
    assert model_digest(pipe, "text_encoder_2") == encoder, "an encoder reads prompts alone"


@pytest.mark.parametrize("change", ["weight", "encoder", "scheduler"])
def test_statistics_of_another_model_are_put_aside(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    how: dict[str, Any] = {"config": CONFIG, "checkpoint": tmp_path}
    first = slimdiff.calibrate(tiny_pipeline(), PROMPTS, **how)
    other = tiny_pipeline()
    CHANGES[change][0](other)
    second = slimdiff.calibrate(other, PROMPTS, **how)
    assert CHANGES[change][1] in caplog.text and "calibrated again" in caplog.text
    fresh = slimdiff.calibrate(other, PROMPTS, CONFIG)
    assert all(torch.equal(total, fresh.sums[name]) for name, total in second.sums.items())
    (tmp_path / EARLIER_FILE).rename(tmp_path / "statistics.safetensors")
    assert Statistics.load(tmp_path).source == first.source


def test_statistics_that_name_no_model_are_not_reused(
    pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = slimdiff.calibrate(pipe, PROMPTS, CONFIG)
    del kept.source["model"]
    kept.save(tmp_path)
    slimdiff.calibrate(pipe, PROMPTS, CONFIG, checkpoint=tmp_path)
    assert "it was not noted which model they are of" in caplog.text


def test_nothing_is_reused_by_a_compression_of_another_model(tmp_path: Path) -> None:
    budget, how = slimdiff.Budget(params=0.9), {"config": CONFIG, "checkpoint": tmp_path}
    reused = []
    for change in (None, None, "encoder"):
        pipe = tiny_pipeline()
        if change:
            CHANGES[change][0](pipe)
        plan = slimdiff.compress(pipe, PROMPTS, budget, **how)
        reused.append(plan.figures["reused"])
    assert reused == [[], ["calibrate", "allocate"], []]


def test_curves_are_of_one_set_of_weights_and_sums(tmp_path: Path) -> None:
    models = [tiny_pipeline().unet for _ in range(2)]
    with torch.no_grad():
        models[1].get_parameter(LAST)[0, 0] += 1
    kept = Statistics("UNet2DConditionModel", Probes(2))
    kept.add("a/h", torch.eye(2), 1.0)
    other = copy.deepcopy(kept)
    other.add("a/h", torch.eye(2), 0.0)
    pairs = [(kept, models[0]), (kept, models[1]), (other, models[0])]
    keys = {
        CurveFile(tmp_path, own, RECIPES["slimdiff"], probed=True, denoiser=model).key
        for own, model in pairs
    }
    assert len(keys) == 3


def test_merging_refuses_other_weights_and_names_what_else_differs(
    pipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = slimdiff.calibrate(pipe, PROMPTS, CONFIG)
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    second.source["model"]["scheduler"]["class"] = "Other"
    second.source["model"]["weights"]["text_encoder"] = "0"
    Statistics.merge([first, second])
    assert "sampled with different scheduler, text_encoder" in caplog.text
    third.source["model"]["parameters"]["bits"] = third.source["model"]["weights"]["unet"] = "0"
    with pytest.raises(slimdiff.SlimdiffError, match="weights of unet differ"):
        Statistics.merge([Statistics.merge([first, second]), third])
    third.source["model"]["parameters"]["kinds"] = "1"
    Statistics.merge([first, third])
    assert "sampled with different unet" in caplog.text, "of another dtype nobody can tell"


def test_statistics_of_other_weights_choose_no_widths_and_make_none(pipe: Any) -> None:
    statistics, budget = slimdiff.calibrate(pipe, PROMPTS, CONFIG), slimdiff.Budget(params=0.9)
    plan = slimdiff.allocate(pipe.unet, statistics, budget)
    other = tiny_pipeline()
    changed_weight(other)
    refused = pytest.raises(slimdiff.SlimdiffError, match="statistics are of another model: weig")
    with refused:
        slimdiff.allocate(other.unet, statistics, budget)
    before = weights_digest(other.unet)
    with refused:
        slimdiff.rewrite(other.unet, statistics, plan)
    assert weights_digest(other.unet) == before
    slimdiff.rewrite(other.unet.to(torch.float64), statistics, plan)


def test_settings_of_another_release_of_a_library_do_not_count(pipe: Any) -> None:
    here = model_digest(pipe)
    there = copy.deepcopy(here)
    for known in (there["scheduler"], there["settings"]["unet"], there["pipeline"]):
        known["new"] = 3
    assert differences(there, here) == differences(here, there) == []
    there["scheduler"] = {}
    assert differences(there, here) == ["the scheduler differs: None, not DDIMScheduler"]


def test_a_compiled_or_moved_model_is_the_same(pipe: Any) -> None:
    before = weights_digest(pipe.unet)
    assert weights_digest(torch.compile(pipe.unet)) == before
    assert weights_digest(copy.deepcopy(pipe.unet).to(memory_format=torch.channels_last)) == before
