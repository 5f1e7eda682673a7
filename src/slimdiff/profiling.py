"""Profiling: layers timed at several widths on the machine at hand.

Each layer runs alone, on inputs that it really gets, at several widths in turn, and with half of
its heads where heads may go. Layers of the same shape are timed once. The denoiser's time under a
plan is then its measured dense time less what its layers save.
"""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.bundles import Size, sizes_of
from slimdiff.evaluate.latency import enough_runs, interleaved, seconds_of
from slimdiff.groups import LAYERS, Group
from slimdiff.heads import halves_of
from slimdiff.plan import Entry
from slimdiff.profile import Profile, digest, read, write
from slimdiff.removal import removable_layers
from slimdiff.shapes import slim_config

Progress = Callable[[str, int, int], None]

WIDTHS = 6
"""Widths of a layer that are timed; between them time is interpolated."""


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
    machine = _machine(denoiser, call) | {"multiple": multiple}
    path = None if folder is None else Path(folder) / f"profile-{digest(machine)}.json"
    layers: dict[str, list[Group]] = {}
    for group in groups:
        layers.setdefault(group.layer, []).append(group)
    kept = read(path, machine)
    if kept is not None and set(layers) <= set(kept.layers):
        return kept
    found = _measured(denoiser, layers, call, machine, multiple, progress)
    if path is not None:
        write(path, found)
    return found


def narrowed(module: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """A copy with the narrow shapes of `config`, random where they differ, shared elsewhere."""
    from slimdiff.slim_denoiser import reshape_

    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    with torch.random.fork_rng():
        return reshape_(copy.deepcopy(module, shared), dict(config))


def calling(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Callable[[], object]:
    """The call to time."""

    def run() -> object:
        with torch.inference_mode():
            return module(*args, **kwargs)

    return run


def _measured(
    denoiser: nn.Module,
    layers: Mapping[str, list[Group]],
    call: Mapping[str, Any],
    machine: dict[str, Any],
    multiple: int,
    progress: Progress | None,
) -> Profile:
    device = next(denoiser.parameters()).device
    inputs = _inputs_of(denoiser, list(layers), call)
    dense = calling(denoiser, (), call)
    runs = enough_runs(seconds_of(dense, device))
    whole = interleaved({"dense": dense}, runs=runs, device=device)
    every = [group for own in layers.values() for group in own]
    may_go = removable_layers(denoiser, every)
    by_heads = {group.layer for group, _ in halves_of(every)}
    known: dict[str, dict[Size, float]] = {}
    found = Profile(machine, whole["dense"].median, {})
    for done, (layer, groups) in enumerate(layers.items(), start=1):
        args, kwargs = inputs.pop(layer)
        module = denoiser.get_submodule(layer)
        alike = f"{_signature(module, groups, args, kwargs)} {layer in may_go}"
        if alike not in known:
            sizes = _sizes(groups[0], multiple, layer in may_go, layer in by_heads)
            calls = {
                str(size): calling(_at_size(module, layer, groups, size), args, kwargs)
                for size in sizes
            }
            runs = enough_runs(seconds_of(calls[str(sizes[-1])], device), total=0.3)
            timed = interleaved(calls, runs=runs, device=device)
            known[alike] = {size: timed[str(size)].median for size in sizes}
        heads = groups[0].heads
        found.layers[layer] = {s.width: t for s, t in known[alike].items() if s.heads == heads}
        for size, seconds in known[alike].items():
            if size.heads < heads:
                found.fixed[layer] = _fixed(
                    found.of(layer, size.width), seconds, size.heads / heads
                )
        if progress is not None:
            progress("profile", done, len(layers))
    return found


def _fixed(every: float, fewer: float, share: float) -> float:
    """Seconds without any head, from those with all and with a share: a straight line."""
    return min(max(0.0, (fewer - share * every) / (1 - share)), every)


def _at_size(module: nn.Module, layer: str, groups: Sequence[Group], size: Size) -> nn.Module:
    entries = {g.name: Entry(g.kind, size.width, g.width, size.heads, g.heads) for g in groups}
    own = [_relative(group, layer) for group in groups]
    return narrowed(module, slim_config(module, own, entries))


def _relative(group: Group, layer: str) -> Group:
    """The group as a part of its layer alone: paths begin there, what is not in it is left out."""
    paths = {
        role: path[len(layer) + 1 :]
        for role, path in group.paths.items()
        if f"{path}.".startswith(f"{layer}.")
    }
    columns = {role: own for role, own in group.columns.items() if role in paths}
    return replace(group, layer="", block="", paths=paths, columns=columns)


def _sizes(group: Group, multiple: int, may_go: bool, by_heads: bool) -> list[Size]:
    """What is timed; the dense size is the last.

    At most `WIDTHS` of the allowed widths, evenly spread, with both ends; 0 if the layer may go; if
    heads may, half of them at the middle one of these widths.
    """
    sizes = sizes_of(group, multiple)
    count = min(WIDTHS, len(sizes))
    chosen = sorted({sizes[round(i * (len(sizes) - 1) / max(1, count - 1))] for i in range(count)})
    fewer = [Size(chosen[len(chosen) // 2], group.heads // 2)] if by_heads else []
    widths = [0, *chosen] if may_go else chosen
    return [*fewer, *(Size(width, group.heads) for width in widths)]


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
