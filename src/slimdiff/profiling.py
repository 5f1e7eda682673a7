"""Profiling: layers timed at several widths on the machine at hand.

Each layer runs alone, on inputs that it really gets, at several widths in turn, and with half of
its heads where heads may go; an upsampler's convolution runs in its upsampler, fused if that is
faster. Layers of the same shape are timed once. The denoiser's time under a plan is then its
measured dense time less what its layers save.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.evaluate.latency import enough_runs, interleaved, seconds_of
from slimdiff.groups import LAYERS, Group
from slimdiff.heads import halves_of
from slimdiff.layer_timing import (
    Times,
    calling,
    fixed_seconds,
    place_of,
    timed_layer,
    timed_sizes,
)
from slimdiff.profile import Profile, digest, read, write
from slimdiff.removal import removable_layers
from slimdiff.upsamplers import fusable
from slimdiff.wrapped import refuse_replaced

Progress = Callable[[str, int, int], None]


def profile(
    denoiser: nn.Module,
    groups: Sequence[Group],
    call: Mapping[str, Any],
    *,
    multiple: int = 8,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Time every layer of `groups` at several widths.

    Args:
        denoiser: dense; it is not changed.
        groups: of the denoiser; the halves of an attention layer are timed at one width.
        call: keyword arguments of a denoiser call, of the batch and size that matter.
        multiple: widths are multiples of this where the layer allows it.
        folder: the profile is kept here, and read if device, dtype, shapes and versions are the
            same.
        progress: called with ("profile", layers done, layers in all).
    """
    refuse_replaced(denoiser)
    machine = _machine(denoiser, call) | {"multiple": multiple}
    path = None if folder is None else Path(folder) / f"profile-{digest(machine)}.json"
    layers: dict[str, list[Group]] = {}
    for group in groups:
        layers.setdefault(group.layer, []).append(group)
    kept = read(path, machine)
    if kept is not None and set(layers) <= set(kept.layers):
        own = {group.upsampler for group in groups}
        return replace(kept, fused={path: s for path, s in kept.fused.items() if path in own})
    found = _measured(denoiser, layers, call, machine, multiple, progress)
    if path is not None:
        write(path, found)
    return found


def _measured(
    denoiser: nn.Module,
    layers: Mapping[str, list[Group]],
    call: Mapping[str, Any],
    machine: dict[str, Any],
    multiple: int,
    progress: Progress | None,
) -> Profile:
    device = next(denoiser.parameters()).device
    inputs = _inputs_of(denoiser, [place_of(groups) for groups in layers.values()], call)
    dense = calling(denoiser, (), call)
    runs = enough_runs(seconds_of(dense, device))
    whole = interleaved({"dense": dense}, runs=runs, device=device)
    every = [group for own in layers.values() for group in own]
    may_go = removable_layers(denoiser, every)
    by_heads = {group.layer for group, _ in halves_of(every)}
    fusable_ones = set(fusable(denoiser, every))
    known: dict[str, Times] = {}
    found = Profile(machine, whole["dense"].median, {})
    for done, (layer, groups) in enumerate(layers.items(), start=1):
        place, heads = place_of(groups), groups[0].heads
        args, kwargs = inputs.pop(place)
        module, may_fuse = denoiser.get_submodule(place), place in fusable_ones
        alike = f"{_signature(module, groups, args, kwargs)} {layer in may_go} {may_fuse}"
        if alike not in known:
            sizes = timed_sizes(groups[0], multiple, layer in may_go, layer in by_heads)
            known[alike] = timed_layer(module, groups, sizes, args, kwargs, may_fuse)
        times = known[alike]
        found.layers[layer] = {s.width: t for s, t in times.seconds.items() if s.heads == heads}
        if times.spared > 0:
            found.fused[place] = times.spared
        for size, seconds in times.seconds.items():
            if size.heads < heads:
                every_head = found.of(layer, size.width)
                found.fixed[layer] = fixed_seconds(every_head, seconds, size.heads / heads)
        if progress is not None:
            progress("profile", done, len(layers))
    return found


def _inputs_of(
    denoiser: nn.Module, layers: Sequence[str], call: Mapping[str, Any]
) -> dict[str, tuple[tuple, dict[str, Any]]]:
    """What each layer gets in one call of the denoiser."""
    inputs: dict[str, tuple[tuple, dict[str, Any]]] = {}

    def hook_for(layer: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs.setdefault(layer, (args, kwargs))

        return hook

    handles = [
        denoiser.get_submodule(layer).register_forward_pre_hook(hook_for(layer), with_kwargs=True)
        for layer in layers
    ]
    try:
        with torch.inference_mode():
            denoiser(**call)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _signature(module: nn.Module, groups: Sequence[Group], args: tuple, kwargs: Any) -> str:
    """Equal for layers that take equally long: class, shapes of weights and of inputs."""
    weights = [(name, *p.shape) for name, p in module.named_parameters()]
    kinds = [(LAYERS[group.kind], group.heads, group.width) for group in groups]
    return repr((type(module).__name__, weights, kinds, _shapes((*args, kwargs))))


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (str(value.dtype), *value.shape)
    if isinstance(value, Mapping):
        return {name: _shapes(v) for name, v in sorted(value.items())}
    return [_shapes(v) for v in value] if isinstance(value, list | tuple) else None


def _machine(denoiser: nn.Module, call: Mapping[str, Any]) -> dict[str, Any]:
    weight = next(denoiser.parameters())
    cuda = weight.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(weight.device) if cuda else platform.processor(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(weight.dtype),
        "torch": torch.__version__,
        "denoiser": type(denoiser).__name__,
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "channels_last": any(p.ndim == 4 and not p.is_contiguous() for p in denoiser.parameters()),
        "inputs": json.loads(json.dumps(_shapes(call))),
    }
