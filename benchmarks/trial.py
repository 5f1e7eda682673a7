"""The reference pipeline on trial: everything that a row of the evidence measures, in one place.

The dense pipeline's denoiser calls along the test prompts are kept once, so that a row's velocity
error costs only its own forwards.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from slimdiff import costs, evaluate
from slimdiff.denoiser import denoiser_of
from slimdiff.evaluate import VelocityError
from slimdiff.reference.accuracy import Accuracy
from slimdiff.reference.bundled import load_reference
from slimdiff.reference.references import reference, sampling_of

STEPS: dict[str, Any] = {"num_inference_steps": 20}
SAMPLING = STEPS | sampling_of("scenes-unet")
BATCH = 16


@dataclass(frozen=True)
class Size:
    """How much is measured: prompts for images and for the velocity error, and timed runs."""

    images: int
    errors: int
    runs: int


class Trial:
    """The dense pipeline, its test prompts, its denoiser calls and its images."""

    def __init__(self, size: Size, name: str = "scenes-unet", split: str = "test") -> None:
        self.size, self.split = size, split
        self.sampling, self.world = STEPS | sampling_of(name), reference(name).world
        self.pipe = load_reference(name, torch.float32)
        self.component, self.dense = denoiser_of(self.pipe)
        for module in (self.dense, self.pipe.vae):
            module.to(memory_format=torch.channels_last)
        self.calls = self._dense_calls(self.prompts(size.errors))
        self.one_row = evaluate.sampling.one_row_of(self.calls[0][0])
        self._images: list[Any] = []

    def prompts(self, count: int) -> list[str]:
        """The first prompts of the split."""
        return self.world.prompts(self.split, count)

    def _dense_calls(self, texts: list[str]) -> list[tuple[dict[str, Any], torch.Tensor]]:
        calls: list[tuple[dict[str, Any], torch.Tensor]] = []

        def hook(_module: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            given = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
            call = {name: value for name, value in given.items() if torch.is_tensor(value)}
            calls.append((call, out[0]))

        handle = self.dense.register_forward_hook(hook, with_kwargs=True)
        try:
            evaluate.generate(
                self.pipe,
                texts,
                range(len(texts)),
                batch_size=BATCH,
                output_type="latent",
                **self.sampling,
            )
        finally:
            handle.remove()
        return calls

    def velocity_error(self, unet: Any) -> VelocityError:
        """Error along the dense trajectory of the first test prompts."""
        error = VelocityError()
        with torch.inference_mode():
            for call, dense in self.calls:
                error.add(
                    float(call["timestep"].flatten()[0]), unet(**call, return_dict=False)[0], dense
                )
        return error

    def macs(self, unet: Any) -> int:
        """MACs of one call as the pipeline makes it, at batch 1: what budgets count too."""
        return costs.measure(unet, [], self.one_row).macs

    def with_denoiser(self, unet: Any) -> Any:
        """A pipeline of the same components with another denoiser."""
        parts = {**self.pipe.components, self.component: unet}
        extra = {"requires_safety_checker": False} if "safety_checker" in parts else {}
        pipe = type(self.pipe)(**parts, **extra)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: Any, count: int, start: int = 0) -> list[Any]:
        """Images of the first test prompts, or from `start` on, with seeds 0, 1, 2, ..."""
        texts, seeds = self.prompts(count)[start:], range(start, count)
        return evaluate.generate(pipe, texts, seeds, batch_size=32, **self.sampling)

    def dense_images(self, count: int) -> list[Any]:
        """The dense pipeline's images of the first `count` test prompts; each is drawn once."""
        if count > len(self._images):
            self._images += self.draw(self.pipe, count, start=len(self._images))
        return self._images[:count]

    def quality(self, pipe: Any, count: int) -> dict[str, Any]:
        """Accuracy with its interval, what else the judge measures, and likeness to dense."""
        dense = self.dense_images(count)
        images = dense if denoiser_of(pipe)[1] is self.dense else self.draw(pipe, count)
        texts = self.prompts(count)
        accuracy = self.world.judge(images, texts)
        before = self.world.judge(dense, texts) if accuracy.graded else accuracy
        return {
            "images": count,
            "scene_accuracy": accuracy.whole,
            "interval": list(accuracy.interval),
            "psnr": evaluate.psnr(images, dense),
            "ssim": evaluate.ssim(images, dense),
            **{name: graded(accuracy, before, name) for name in accuracy.graded},
        }

    def call_speedup(self, unet: Any, rows: int = 2) -> float:
        """Times faster than dense: one denoiser call; two rows are one image with guidance."""
        call = dict(self.calls[0][0])
        call |= {name: value[:rows] for name, value in call.items() if value.ndim}

        def calling(unet: Any) -> Any:
            def run() -> None:
                with torch.inference_mode():
                    unet(**call)

            return run

        return self._speedup(calling(self.dense), calling(unet), 5 * self.size.runs)

    def sampling_speedup(self, pipe: Any) -> float:
        """Times faster than dense: the sampling of one image, without the VAE."""

        def sampling(pipe: Any) -> Any:
            texts = self.prompts(1)
            return lambda: evaluate.generate(
                pipe, texts, [0], output_type="latent", **self.sampling
            )

        return self._speedup(sampling(self.pipe), sampling(pipe), self.size.runs)

    def _speedup(self, dense: Any, slim: Any, runs: int) -> float:
        found = evaluate.interleaved({"dense": dense, "slim": slim}, runs=runs, warmup=2)
        return found["dense"].speedup_of(found["slim"])

    def copy_of_denoiser(self) -> Any:
        """A dense denoiser to change."""
        return copy.deepcopy(self.dense)


def graded(slim: Accuracy, dense: Accuracy, name: str) -> dict[str, Any]:
    """A measure of the judge: its mean, and its change from the dense images, with intervals."""
    change, interval = slim.change_from(dense, name)
    return {
        "mean": slim.means[name],
        "interval": list(slim.interval_of(name)),
        "change": change,
        "change_interval": list(interval),
    }
