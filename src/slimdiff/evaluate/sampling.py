"""Sampling: the same prompts and seeds through any pipeline."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from slimdiff.calls import bound
from slimdiff.chance import seeded
from slimdiff.denoiser import component_of, denoiser_of
from slimdiff.errors import SlimdiffError
from slimdiff.probes import Probes


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 20,
    guidance_scale: float | None = None,
    batch_size: int = 4,
    output_type: str = "pil",
    **call: Any,
) -> list[Any]:
    """One image for each prompt and its seed.

    Each image's initial noise comes from a CPU generator of its own, so it is the same whatever the
    batch size and the device. What a scheduler draws from the global generators depends on the
    seeds as well, and on the batch size; the global generators are afterwards as they were before.

    Args:
        pipe: a diffusers text-to-image pipeline.
        prompts: one per image.
        seeds: one per image.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; None is the pipeline's own.
        batch_size: images that run together.
        output_type: `pil`, or any other that the pipeline knows.
        call: further arguments of the pipeline's call, such as height; None is left out.

    Raises:
        SlimdiffError: no prompt, or not as many seeds as prompts.
    """
    how: dict[str, Any] = {"guidance_scale": guidance_scale, **call}
    how |= {"num_inference_steps": num_inference_steps, "batch_size": batch_size}
    found = outputs(pipe, prompts, seeds, output_type=output_type, **how)
    return [image for output in found for image in output[0]]


def outputs(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 20,
    batch_size: int = 4,
    **call: Any,
) -> Iterator[Any]:
    """What the pipeline returns for each batch; the first entry holds images, or a video's frames.

    Arguments and errors are those of `generate`.
    """
    if isinstance(prompts, str):
        raise SlimdiffError(f"prompts is one string, expected a list: [{prompts!r}]")
    if not prompts or len(prompts) != len(seeds) or batch_size < 1:
        raise SlimdiffError(
            f"got {len(prompts)} prompts, {len(seeds)} seeds and batch size {batch_size}; expected "
            f"at least one prompt, a seed for each, and a batch size of at least 1"
        )
    call = {name: value for name, value in call.items() if value is not None}
    call |= {"num_inference_steps": num_inference_steps}
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
        with torch.inference_mode(), _silent(pipe), seeded(seeds[start]):
            output = pipe(prompt=list(prompts[part]), generator=generators, **call)
        yield output


class _Caught(Exception):
    """Carries the arguments of a call that is not made."""

    def __init__(self, call: dict[str, Any]) -> None:
        super().__init__()
        self.call = call


def first_call(
    pipe: Any, prompt: str = "", *, component: str | None = None, **sampling: Any
) -> dict[str, Any]:
    """Keyword arguments of the first denoiser call for one image; the call itself is not made.

    Args:
        pipe: a diffusers text-to-image pipeline.
        prompt: what to draw.
        component: a text encoder, for its first call instead.
        sampling: as for `generate`.

    Raises:
        SlimdiffError: the pipeline never calls its denoiser, or the component.
    """
    name, module = component_of(pipe, component)
    return _until(pipe, name, module, [prompt], sampling)


def encode(pipe: Any, prompts: Sequence[str], **sampling: Any) -> None:
    """Have the text encoders of `pipe` read `prompts` as they would to draw them; nothing is drawn.

    Args:
        pipe: a diffusers text-to-image pipeline.
        prompts: one batch.
        sampling: as for `generate`; with guidance the empty prompt is encoded too.

    Raises:
        SlimdiffError: the pipeline never calls its denoiser.
    """
    name, denoiser = denoiser_of(pipe)
    _until(pipe, name, denoiser, prompts, sampling | {"batch_size": len(prompts)})


def _until(
    pipe: Any, name: str, module: nn.Module, prompts: Sequence[str], sampling: dict[str, Any]
) -> dict[str, Any]:
    """Run `pipe` until it calls `module`, and return the arguments of that call."""
    signature = inspect.signature(module.forward)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Caught(bound(signature, args, kwargs))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        generate(pipe, prompts, range(len(prompts)), output_type="latent", **sampling)
    except _Caught as caught:
        return caught.call
    finally:
        handle.remove()
    raise SlimdiffError(f"{type(pipe).__name__}: made an image without calling its {name}")


def one_row_of(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a denoiser call for a batch of one, to count MACs on."""
    probes = Probes(1)
    probes.offer(call)
    return probes.batches(1)[0]


@contextlib.contextmanager
def _silent(pipe: Any) -> Iterator[None]:
    """No progress bar of the pipeline's own."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
