"""Sampling: the same prompts and seeds through any pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from slimdiff.errors import SlimdiffError


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
    batch size and the device.

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
    if not prompts or len(prompts) != len(seeds) or batch_size < 1:
        raise SlimdiffError(
            f"got {len(prompts)} prompts, {len(seeds)} seeds and batch size {batch_size}; expected "
            f"at least one prompt, a seed for each, and a batch size of at least 1"
        )
    optional = {"guidance_scale": guidance_scale, **call}
    optional = {name: value for name, value in optional.items() if value is not None}
    images: list[Any] = []
    with torch.inference_mode(), _silent(pipe):
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            output = pipe(
                prompt=list(prompts[part]),
                num_inference_steps=num_inference_steps,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]],
                output_type=output_type,
                **optional,
            )
            images.extend(output.images)
    return images


@contextlib.contextmanager
def _silent(pipe: Any) -> Iterator[None]:
    """No progress bar of the pipeline's own."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
