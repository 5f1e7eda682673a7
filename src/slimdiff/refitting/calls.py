"""Calls: what the denoiser of a pipeline is given while prompts are sampled, kept to refit on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slimdiff.calls import bound, flatten, item_of, row_of
from slimdiff.denoiser import denoiser_of
from slimdiff.evaluate.sampling import generate
from slimdiff.probes import Probe, Probes

TOGETHER = 16
"""Samples of one call, at most."""


def sampled_calls(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], rows: int, **sampling: Any
) -> list[dict[str, Any]]:
    """Denoiser calls of about `rows` samples that were seen while `prompts` were drawn.

    Samples are drawn evenly from every call of the denoiser, so they are spread over prompts, steps
    and both halves of guidance, and joined to calls of `TOGETHER`.

    Args:
        pipe: a diffusers pipeline; its denoiser runs as it is.
        prompts, seeds: one seed for each prompt.
        rows: samples that are kept in all.
        sampling: as for `generate`.

    Returns:
        Keyword arguments, on the denoiser's device.
    """
    denoiser = denoiser_of(pipe)[1]
    signature = inspect.signature(denoiser.forward)
    seen: list[list[Probe]] = []

    def keep(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(samples_of(bound(signature, args, kwargs), len(seen)))

    handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        generate(pipe, prompts, seeds, output_type="latent", **sampling)
    finally:
        handle.remove()
    chosen = thinned(seen, rows)
    probes = Probes(len(chosen), rows={probe.key: probe for probe in chosen})
    return probes.batches(TOGETHER, next(denoiser.parameters()).device)


def samples_of(arguments: Mapping[str, Any], call: int = 0) -> list[Probe]:
    """The samples of one call, given by its keyword arguments; keys are in the order of calls."""
    tensors, constants = flatten(arguments)
    count = count_of(arguments)
    return [
        Probe(
            f"{call:06d}/{row:06d}",
            {path: row_of(tensor, row, count).detach().cpu() for path, tensor in tensors.items()},
            {path: item_of(value, row, count) for path, value in constants.items()},
        )
        for row in range(count)
    ]


def count_of(arguments: Mapping[str, Any]) -> int:
    """How many samples a call is for."""
    tensors, _ = flatten(arguments)
    return next((len(tensor) for tensor in tensors.values() if tensor.ndim > 1), 1)


def thinned(calls: Sequence[Sequence[Probe]], rows: int, seed: int = 0) -> list[Probe]:
    """About `rows` samples, drawn evenly from every call."""
    share = min(1.0, rows / max(sum(len(call) for call in calls), 1))
    chance = torch.Generator().manual_seed(seed)
    kept: list[Probe] = []
    for call in calls:
        count = int(share * len(call) + float(torch.rand((), generator=chance)))
        order = torch.randperm(len(call), generator=chance)[:count].tolist()
        kept += [call[place] for place in sorted(order)]
    return kept
