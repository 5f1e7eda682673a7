"""Pictures that are none: covered by a checker, flagged, black, or not finite."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import slimdiff
from slimdiff.evaluate import Settings, evaluate, generate
from slimdiff.evaluate.pictures import draw, fit_pairs, left_out_told, uncovered
from slimdiff.metrics import image_tensor
from slimdiff.report import rows
from slimdiff.results import read
from tiny_pipeline import image, tiny_pipeline

PROMPTS = ["a red circle", "a blue ring", "a green square"]
QUICK = Settings(num_inference_steps=2, batch_size=2, runs=1, pipeline_runs=0)


class Checker(nn.Module):
    """Finds every picture unsafe and blackens it, as that of Stable Diffusion does."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, images: torch.Tensor, clip_input: Any) -> tuple[Any, list[bool]]:
        return torch.zeros_like(images), [True] * len(images)


class Extractor:
    def __call__(self, images: Any, return_tensors: str) -> Any:
        from transformers import BatchFeature

        return BatchFeature({"pixel_values": torch.zeros(len(images), 3, 8, 8)})


def checked() -> Any:
    pipe = tiny_pipeline()
    for name, part in (("safety_checker", Checker()), ("feature_extractor", Extractor())):
        object.__setattr__(pipe, name, part)
    return pipe


def slim_of(pipe: Any) -> Any:
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        other.unet.conv_out.weight *= 1.1
    return other


def broken(pipe: Any, place: slice) -> Any:
    """As a VAE that overflows in half precision: some pictures of each batch have NaN in them."""

    def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        output[place, :, 0, 0] = torch.nan
        return output

    pipe.vae.decoder.register_forward_hook(hook)
    return pipe


def test_pictures_are_those_that_are_generated() -> None:
    pipe = tiny_pipeline()
    how: dict[str, Any] = {"num_inference_steps": 2, "batch_size": 2}
    drawn, made = draw(pipe, PROMPTS, range(3), **how), generate(pipe, PROMPTS, range(3), **how)
    assert torch.equal(image_tensor([p.image for p in drawn]), image_tensor(made))
    assert [picture.fault for picture in drawn] == [None] * 3


def test_a_safety_checker_does_not_cover_what_is_measured(tmp_path: Path) -> None:
    pipe = checked()
    covered = generate(pipe, PROMPTS, range(3), num_inference_steps=2)
    assert not image_tensor(covered).any(), "the user's pictures are checked as ever"
    found = evaluate(pipe, slim_of(pipe), PROMPTS, QUICK)
    plain = tiny_pipeline()
    expected = evaluate(plain, slim_of(plain), PROMPTS, QUICK)
    assert found["fidelity"]["pictures"]["drawn_without"] == ["safety_checker"]
    assert expected["fidelity"]["pictures"]["drawn_without"] == []
    assert found["fidelity"]["images"] == expected["fidelity"]["images"]
    assert found["fidelity"]["images"]["psnr"] < 60 and found["images"] == expected["images"]
    assert isinstance(pipe.safety_checker, Checker)


def test_a_pipeline_without_its_covers_is_saved_with_them() -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = checked()
    pipe.watermark = watermark = object()
    config = dict(pipe.config)
    with pytest.raises(KeyError), uncovered(pipe) as names:
        assert names == ["safety_checker", "watermark"]
        assert pipe.safety_checker is None and pipe.watermark is None
        raise KeyError
    assert isinstance(pipe.safety_checker, Checker) and pipe.watermark is watermark
    assert dict(pipe.config) == config
    assert "watermark" in StableDiffusionXLPipeline.__init__.__code__.co_names


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    dense = broken(tiny_pipeline(), slice(1, 2))
    found = evaluate(dense, slim_of(tiny_pipeline()), PROMPTS, QUICK)
    fidelity = found["fidelity"]
    assert fidelity["pictures"] == {
        "drawn": 3,
        "measured": 2,
        "left_out": {
            "dense": {"not_finite": 1, "flagged": 0, "black": 0},
            "slim": {"not_finite": 0, "flagged": 0, "black": 0},
        },
        "drawn_without": [],
    }
    assert fidelity["images"]["count"] == fidelity["frechet"]["count"] == 2
    assert fidelity["velocity"]["prompts"] == 3 and len(found["images"]) == 2
    row = next(row for row in rows.fidelity(fidelity) if row.name == "pictures left out")
    assert (row.dense, row.slim) == ("1", "0")
    assert row.note == "not finite; 2 of 3 pairs are measured"


def test_where_no_picture_is_left_figures_say_so() -> None:
    dense = broken(tiny_pipeline(), slice(None))
    scenes = {"whole": 0.5, "interval": [0.1, 0.9], "attributes": {}, "count": 3}
    found = evaluate(dense, slim_of(tiny_pipeline()), PROMPTS, QUICK, judge=lambda *_: scenes)
    for name in ("images", "frechet", "kernel", "scenes"):
        assert (
            "no pair of pictures is left to measure on (dense: 3 not finite)"
            in (found["fidelity"][name]["unavailable"])
        )
    assert "NaN" not in json.dumps(found) and found["images"] == []
    assert list(rows.fidelity(found["fidelity"]))


def test_predictions_that_are_not_finite_are_no_figure() -> None:
    slim = slim_of(tiny_pipeline())
    with torch.no_grad():
        slim.unet.conv_out.bias += torch.inf
    found = evaluate(tiny_pipeline(), slim, PROMPTS, QUICK)
    assert "NaN or infinity" in found["fidelity"]["velocity"]["unavailable"]
    assert found["fidelity"]["velocity"]["prompts"] == 3
    json.dumps(found, allow_nan=False)


def test_flags_of_a_pipeline_s_own_black_pictures_and_videos() -> None:
    class Output(tuple):
        nsfw_content_detected = [False, True, False, False]

    class Own:
        _progress_bar_config: dict[str, Any] = {}

        def set_progress_bar_config(self, **_: Any) -> None:
            pass

        def __call__(self, prompt: list[str], **_: Any) -> Any:
            video = np.stack([np.full((4, 4, 3), level) for level in (0.1, 0.5, 0.9)])
            grey, black = np.full((4, 4, 1), 0.2), Image.new("RGB", (4, 4))
            return Output(([video, video, grey, black],))

    drawn = draw(Own(), ["a"] * 4, range(4))
    assert [picture.fault for picture in drawn] == [None, "flagged", None, "black"]
    assert drawn[0].image.getpixel((0, 0)) == (128, 128, 128), "the frame in the middle"
    fit, counted = fit_pairs({"dense": drawn, "slim": drawn[:1] * 4})
    assert fit == [0, 2]
    assert left_out_told(counted) == "dense: 1 flagged as unsafe; dense: 1 wholly black"


def test_a_report_leaves_out_what_is_no_picture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = broken(tiny_pipeline(), slice(1))
    config = slimdiff.CalibrationConfig(num_inference_steps=1, num_probes=2, batch_size=2)
    budget, path = slimdiff.Budget(params=0.95), tmp_path / "r.json"
    slimdiff.compress(pipe, PROMPTS[:2], budget, config=config, results=path, pictures=2)
    results = read(path)
    assert [shown["prompt"] for shown in results["images"]] == [PROMPTS[1]]
    assert results["made"]["pictures"]["left_out"]["slim"]["not_finite"] == 1
    assert "dense: 1 not finite; slim: 1 not finite" in caplog.text


def test_a_black_picture_is_not_saved_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from slimdiff.cli import images

    broken(tiny_pipeline(), slice(0)).save_pretrained(tmp_path / "m")
    out, loaded = tmp_path / "out.png", tiny_pipeline()
    dead = broken(loaded, slice(None))
    dead.vae.decoder.register_forward_hook(lambda *_args: torch.full((1, 3, 32, 32), torch.nan))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images.models, "load", lambda *_: dead)
        images.generate(str(tmp_path / "m"), prompt=["a cat"], out=out, steps=1)
    assert "is wholly black" in caplog.text and out.is_file()


def test_comparing_on_the_command_line_says_what_it_left_out(capsys: Any) -> None:
    from slimdiff.cli.images import _likeness

    black = draw(broken(tiny_pipeline(), slice(1)), PROMPTS[:2], [0, 1], num_inference_steps=1)
    plain = draw(tiny_pipeline(), PROMPTS[:2], [0, 1], num_inference_steps=1)
    told = _likeness({"slim": black, "dense": plain})
    assert told.endswith("; 1 of 2 pairs measured (slim: 1 not finite left out)")
    assert "PSNR 100.0" in told
    assert _likeness({"slim": black[:1], "dense": plain[:1]}).startswith("nothing to measure; 0 of")
    assert image(tiny_pipeline()).any()
