"""Calls: what the denoiser of a pipeline is given while prompts are sampled, kept to refit on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.denoiser import denoiser_of
from slimdiff.evaluate.sampling import generate
from slimdiff.probes import bound

Call = dict[str, Any]


def sampled_calls(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], rows: int, **sampling: Any
) -> list[Call]:
    """Keyword arguments of the denoiser's calls while `prompts` are drawn, thinned to about `rows`.

    Rows are drawn evenly from every call, so they are spread over prompts, steps and both halves of
    guidance.

    Args:
        pipe: a diffusers pipeline; its denoiser runs as it is.
        prompts, seeds: one seed for each prompt.
        rows: samples that are kept in all.
        sampling: as for `generate`.
    """
    denoiser = denoiser_of(pipe)[1]
    signature = inspect.signature(denoiser.forward)
    calls: list[Call] = []

    def keep(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(_copied(bound(signature, args, kwargs)))

    handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        generate(pipe, prompts, seeds, output_type="latent", **sampling)
    finally:
        handle.remove()
    return thinned(calls, rows)


def thinned(calls: Sequence[Mapping[str, Any]], rows: int, seed: int = 0) -> list[Call]:
    """The calls with about `rows` samples in all, drawn evenly from every one of them."""
    counts = [samples_of(call) for call in calls]
    share = rows / max(sum(counts), 1)
    if share >= 1:
        return [dict(call) for call in calls]
    chance = torch.Generator().manual_seed(seed)
    thin: list[Call] = []
    for call, count in zip(calls, counts, strict=True):
        own = int(share * count + float(torch.rand((), generator=chance)))
        chosen = torch.randperm(count, generator=chance)[:own].sort().values
        if own:
            thin.append({name: _taken(value, chosen, count) for name, value in call.items()})
    return thin


def samples_of(call: Mapping[str, Any]) -> int:
    """How many samples a call is for: the first size of its first tensor that has several."""
    return next((len(t) for t in call.values() if isinstance(t, Tensor) and t.ndim > 1), 1)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(part) for part in value)
    return value


def _taken(value: Any, chosen: Tensor, samples: int) -> Any:
    """Some rows of nested arguments; what is not one for each sample stays."""
    if isinstance(value, Tensor):
        several = value.ndim > 0 and len(value) == samples
        return value[chosen.to(value.device)] if several else value
    if isinstance(value, dict):
        return {name: _taken(part, chosen, samples) for name, part in value.items()}
    if type(value) in (list, tuple):
        if len(value) == samples and not any(isinstance(part, Tensor) for part in value):
            return type(value)(value[place] for place in chosen.tolist())
        return type(value)(_taken(part, chosen, samples) for part in value)
    return value
