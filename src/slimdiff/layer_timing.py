"""One layer timed at several sizes, on inputs that it really gets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from slimdiff.bundles import Size, sizes_of
from slimdiff.evaluate.latency import enough_runs, interleaved, seconds_of
from slimdiff.groups import Group
from slimdiff.plan import Entry
from slimdiff.shapes import slim_config

WIDTHS = 6
"""Widths of a layer that are timed; between them time is interpolated."""


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


@dataclass(frozen=True)
class Times:
    """Seconds of one layer by size, and what fusing it spares at its dense size (0: it is not)."""

    seconds: dict[Size, float]
    spared: float


def timed_layer(
    module: nn.Module,
    groups: Sequence[Group],
    sizes: Sequence[Size],
    args: tuple,
    kwargs: Mapping[str, Any],
    may_fuse: bool,
) -> Times:
    """Time one module at several sizes in turn, as it is or fused, whatever is faster.

    Args:
        module: what `place_of` names.
        groups: of its layer.
        sizes: of the layer; the last is the dense one.
        args, kwargs: what the module gets.
        may_fuse: it is an upsampler that can be fused.
    """
    device, dense = next(module.parameters()).device, sizes[-1]
    plain = calling(_at_size(module, groups, dense, False), args, kwargs)
    runs = enough_runs(seconds_of(plain, device), total=0.3)
    spared = 0.0
    if may_fuse:
        fused = calling(_at_size(module, groups, dense, True), args, kwargs)
        both = interleaved({"plain": plain, "fused": fused}, runs=runs, device=device)
        spared = max(0.0, both["plain"].median - both["fused"].median)
    calls = {
        str(size): calling(_at_size(module, groups, size, spared > 0), args, kwargs)
        for size in sizes
    }
    timed = interleaved(calls, runs=runs, device=device)
    return Times({size: timed[str(size)].median for size in sizes}, spared)


def fixed_seconds(every: float, fewer: float, share: float) -> float:
    """Seconds without any head, from those with all and with a share: a straight line."""
    return min(max(0.0, (fewer - share * every) / (1 - share)), every)


def place_of(groups: Sequence[Group]) -> str:
    """The module that is timed for a layer."""
    return groups[0].upsampler or groups[0].layer


def _at_size(module: nn.Module, groups: Sequence[Group], size: Size, fused: bool) -> nn.Module:
    entries = {g.name: Entry(g.kind, size.width, g.width, size.heads, g.heads) for g in groups}
    own = [_relative(group, place_of(groups)) for group in groups]
    return narrowed(module, slim_config(module, own, entries, [""] if fused else []))


def _relative(group: Group, place: str) -> Group:
    """The group as a part of one module alone: paths begin there, what is not in it is left out."""
    begin = len(place) + 1
    paths = {
        role: path[begin:]
        for role, path in group.paths.items()
        if f"{path}.".startswith(f"{place}.")
    }
    columns = {role: own for role, own in group.columns.items() if role in paths}
    return replace(group, layer=group.layer[begin:], block="", paths=paths, columns=columns)


def timed_sizes(group: Group, multiple: int, may_go: bool, by_heads: bool) -> list[Size]:
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
