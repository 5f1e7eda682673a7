"""A dense model on trial: its pipeline, its prompts, and its denoiser calls along trajectories."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generalisation.specs import SPECS
from generalisation.training import CACHE, CALIBRATION, STEPS, TEST
from generalisation.worlds import distinct
from slimdiff.calls import bound
from slimdiff.checkpoint import load_pipeline
from slimdiff.denoiser import denoiser_of
from slimdiff.evaluate import generate
from slimdiff.reference.bundled import bundled_path
from slimdiff.reference.references import reference, sampling_of

BUNDLED = ("scenes-unet", "scenes-dit", "emoji-unet")
"""The bundled references that are slimmed beside the models trained here."""

Call = tuple[dict[str, Any], Tensor]


@dataclass
class Errors:
    """Squared errors of a slim denoiser's velocities and the dense velocities' squares, by prompt.

    Attributes:
        squared, energy: of both halves of guidance, summed over steps: (prompts,), float64.
        guided_squared, guided_energy: of u + g (c - u), the prediction that sampling follows.
    """

    squared: Tensor
    energy: Tensor
    guided_squared: Tensor
    guided_energy: Tensor

    def record(self) -> dict[str, Any]:
        """Both errors, the first one's standard error, and its parts by prompt, for JSON.

        The standard error is that of a ratio of sums over independent prompts.
        """
        whole = float(self.energy.sum())
        error = float(self.squared.sum()) / whole
        rest = (self.squared - error * self.energy).square().sum().sqrt()
        return {
            "error": error,
            "standard_error": float(rest) / whole,
            "guided_error": float(self.guided_squared.sum() / self.guided_energy.sum()),
            "by_prompt": [float(f"{part / whole:.4g}") for part in self.squared.tolist()],
        }


@dataclass(frozen=True)
class Subject:
    """One dense model and how it is judged.

    Attributes:
        folder: its pipeline.
        sampling: how it is called.
        calibration, test: prompts, disjoint.
    """

    name: str
    folder: Path
    sampling: dict[str, Any]
    calibration: list[str] = field(repr=False)
    test: list[str] = field(repr=False)

    @classmethod
    def read(cls, folder: Path, name: str = "") -> Subject:
        """A trained model's folder: `pipeline`, `model.json` and two lists of prompts."""
        told = json.loads((folder / "model.json").read_text())
        lists = [
            (folder / f"{split}.txt").read_text().splitlines() for split in ("calibration", "test")
        ]
        return cls(name or folder.name, folder / "pipeline", told["sampling"], *lists)

    @cached_property
    def pipe(self) -> Any:
        """The dense pipeline in float32."""
        pipe = load_pipeline(self.folder, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        denoiser_of(pipe)[1].to(memory_format=torch.channels_last)
        return pipe

    def copy_of_pipe(self) -> Any:
        """A pipeline of the same components with a denoiser of its own."""
        name, denoiser = denoiser_of(self.pipe)
        parts = {**self.pipe.components, name: copy.deepcopy(denoiser)}
        extra = {"requires_safety_checker": False} if "safety_checker" in parts else {}
        pipe = type(self.pipe)(**parts, **extra)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def calls(self, prompts: int, steps: int, batch: int) -> list[Call]:
        """The denoiser's arguments and predictions while the first test prompts are drawn."""
        denoiser = denoiser_of(self.pipe)[1]
        signature, found = inspect.signature(denoiser.forward), []

        def hook(_module: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            found.append((bound(signature, args, kwargs) | {"return_dict": False}, out[0]))

        handle = denoiser.register_forward_hook(hook, with_kwargs=True)
        sampling = self.sampling | {"num_inference_steps": steps, "batch_size": batch}
        texts = self.test[:prompts]
        try:
            generate(self.pipe, texts, range(len(texts)), output_type="latent", **sampling)
        finally:
            handle.remove()
        return found

    def errors(self, slim: Any, calls: list[Call], prompts: int, batch: int) -> Errors:
        """How far the denoiser `slim` is from the dense one on `calls`."""
        steps = len(calls) // -(-prompts // batch)
        sums = torch.zeros(4, prompts, dtype=torch.float64)
        with torch.inference_mode():
            for place, (call, dense) in enumerate(calls):
                start = place // steps * batch
                part = slice(start, min(start + batch, prompts))
                sums[:, part] += self._squares(slim(**call)[0], dense)
        return Errors(*sums)

    def _squares(self, slim: Tensor, dense: Tensor) -> Tensor:
        """What one call adds to the sums of `Errors`, for its prompts: (4, prompts)."""
        halves = [_halves(slim.double()), _halves(dense.double())]
        scale = self.sampling["guidance_scale"]
        guided = [u + scale * (c - u) for u, c in halves]
        (u, c), (dense_u, dense_c) = halves
        parts = [
            _per_prompt(u - dense_u) + _per_prompt(c - dense_c),
            _per_prompt(dense_u) + _per_prompt(dense_c),
            _per_prompt(guided[0] - guided[1]),
            _per_prompt(guided[1]),
        ]
        return torch.stack(parts)


def _halves(velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Unconditional and conditional rows of a guided call."""
    unconditional, conditional = velocity.chunk(2)
    return unconditional, conditional


def _per_prompt(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).sum(1)


def bundled(name: str) -> Subject:
    """A bundled reference with prompts of its world."""
    world = reference(name).world
    lists = (distinct(world, "calibration", CALIBRATION), distinct(world, "test", TEST))
    sampling = {"num_inference_steps": STEPS} | sampling_of(name)
    return Subject(name, bundled_path(name), sampling, *lists)


def subjects(work: Path = CACHE) -> list[str]:
    """Names of all models that are there: bundled references, and what was trained in `work`."""
    trained = [name for name in SPECS if (work / name / "model.json").is_file()]
    return [*BUNDLED, *trained]


def subject(name: str, work: Path = CACHE) -> Subject:
    """A model by its name, or by the folder that it was trained into.

    Raises:
        FileNotFoundError: no such model was trained.
    """
    if name in BUNDLED:
        return bundled(name)
    return Subject.read(work / name if (work / name).is_dir() else Path(name))
