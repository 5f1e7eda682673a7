"""Velocity error: how far a slim denoiser's predictions are from the dense one's."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.denoiser import denoiser_of
from slimdiff.errors import SlimdiffError
from slimdiff.evaluate.sampling import generate


@dataclass
class VelocityError:
    """Squared error of the denoiser's prediction, summed over calls.

    Attributes:
        squared: timestep -> sum of (slim - dense)^2.
        energy: timestep -> sum of dense^2.
        calls: denoiser calls seen.
    """

    squared: dict[float, float] = field(default_factory=dict)
    energy: dict[float, float] = field(default_factory=dict)
    calls: int = 0

    @property
    def relative(self) -> float:
        """The error of all timesteps together, relative to the dense prediction."""
        return sum(self.squared.values()) / sum(self.energy.values())

    @property
    def by_timestep(self) -> dict[float, float]:
        """The relative error at each timestep, in sampling order."""
        return {step: self.squared[step] / self.energy[step] for step in self.squared}

    def add(self, timestep: float, slim: Tensor, dense: Tensor) -> None:
        """Add one call's predictions."""
        dense = dense.double()
        squared = float((slim.double() - dense).square().sum())
        self.squared[timestep] = self.squared.get(timestep, 0.0) + squared
        self.energy[timestep] = self.energy.get(timestep, 0.0) + float(dense.square().sum())
        self.calls += 1


def velocity_error(dense: Any, slim: Any, prompts: Sequence[str], **sampling: Any) -> VelocityError:
    """`velocity_errors` for one slim denoiser."""
    return velocity_errors(dense, {"slim": slim}, prompts, **sampling)["slim"]


def velocity_errors(
    dense: Any,
    slim: Mapping[str, Any],
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float | None = None,
    batch_size: int = 4,
    **call: Any,
) -> dict[str, VelocityError]:
    """Errors of slim denoisers along the dense pipeline's own sampling trajectory.

    While `dense` samples, each input of its denoiser also goes through every slim denoiser; both
    halves of classifier-free guidance count. Nothing is stored but sums.

    Args:
        dense: the dense pipeline.
        slim: name -> slim pipeline or bare denoiser, of the dense one's dtype and device.
        prompts: held-out prompts.
        seeds: one per prompt; 0, 1, 2, ... by default.
        num_inference_steps: as for `generate`, like the two that follow.
        guidance_scale: None is the pipeline's own.
        batch_size: prompts that run together.
        call: further arguments of the pipeline's call, as for `generate`.

    Raises:
        SlimdiffError: no prompt; a slim denoiser that is the dense one, or of another dtype.
    """
    with comparing(dense, slim) as errors:
        generate(
            dense,
            prompts,
            range(len(prompts)) if seeds is None else seeds,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
            output_type="latent",
            **call,
        )
    return errors


@contextlib.contextmanager
def comparing(dense: Any, slim: Mapping[str, Any]) -> Iterator[dict[str, VelocityError]]:
    """While the dense pipeline runs inside, add up the errors of the slim denoisers on its inputs.

    Args:
        dense: the dense pipeline or its denoiser.
        slim: name -> slim pipeline or bare denoiser, of the dense one's dtype and device.

    Raises:
        SlimdiffError: a slim denoiser that is the dense one, or of another dtype.
    """
    denoiser = model_of(dense)
    others = {name: model_of(model) for name, model in slim.items()}
    for name, other in others.items():
        _check_comparable(name, other, denoiser)
    errors = {name: VelocityError() for name in others}
    signature = inspect.signature(denoiser.forward)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        timestep = signature.bind(*args, **kwargs).arguments["timestep"]
        step = float(torch.as_tensor(timestep).flatten()[0])
        for name, other in others.items():
            errors[name].add(step, _sample_of(other(*args, **kwargs)), _sample_of(out))

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield errors
    finally:
        handle.remove()


def model_of(model: Any) -> nn.Module:
    """The denoiser of a pipeline, or the bare denoiser itself."""
    return model if isinstance(model, nn.Module) else denoiser_of(model)[1]


def _check_comparable(name: str, slim: nn.Module, dense: nn.Module) -> None:
    if slim is dense:
        raise SlimdiffError(
            f"{name}: is the dense denoiser itself; compress a copy (copy.deepcopy), or load both"
        )
    there, here = next(slim.parameters()), next(dense.parameters())
    if (there.dtype, there.device) != (here.dtype, here.device):
        raise SlimdiffError(
            f"{name}: is {there.dtype} on {there.device}, the dense denoiser {here.dtype} on "
            f"{here.device}; load both with the same dtype and device"
        )


def _sample_of(output: Any) -> Tensor:
    """A denoiser's prediction: the first of a tuple, or of a diffusers output."""
    return output[0]
