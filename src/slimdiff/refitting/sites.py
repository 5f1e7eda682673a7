"""Sites: where what a layer puts out meets the residual stream.

A layer of a branch changes the stream elementwise: stream = base + gate * output, where the gate is
1, or what a modulation makes of the timestep. Which of the tensors that pass between the modules of
a block is that stream is found by changing the layer's output and watching what follows. So no
family has to say it, gated or not.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

STEPS = (1.0, 2.5)
"""Sizes of the two changes to an output; what is not linear does not answer both in proportion."""

TOLERANCE = 1e-4
"""Of gates: more than the rounding of float32, in which the block runs for this."""


@dataclass(frozen=True)
class Site:
    """A tensor that enters or leaves a module.

    Attributes:
        path: of the module, from the denoiser on.
        side: `in` or `out`.
        place: which of the tensors among its arguments or outputs.
        gated: the gate is not the same number everywhere.
        gate: that number, if it is.
    """

    path: str
    side: Literal["in", "out"]
    place: int = 0
    gated: bool = False
    gate: float = 1.0


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of nested arguments or outputs, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors_in(part)]
    return []


@contextlib.contextmanager
def watching(model: nn.Module, site: Site, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand what passes at `site` to `see` while `model` runs inside."""
    module = model.get_submodule(site.path)

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        see(tensors_in((args, kwargs))[site.place])

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        see(tensors_in(output)[site.place])

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if site.side == "in"
        else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def changed(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Add `change` of a layer's output to it while it runs inside."""
    handle = layer.register_forward_hook(lambda _module, _args, y: y + change(y))
    try:
        yield
    finally:
        handle.remove()


def find_site(block: nn.Module, prefix: str, layer: str, call: tuple[tuple, dict]) -> Site:
    """The last tensor of a block that is the stream with the output of one of its layers in it.

    Args:
        block: the module that encloses branch and sum; `prefix` is its path in the denoiser.
        layer: path of the linear or convolution inside the block.
        call: its arguments, for a few samples.

    Returns:
        Where the layer's own output is, if no sum is found.
    """
    block, call = copy.deepcopy(block).float(), _in_float32(call)
    module = block.get_submodule(layer)
    seen = _passing(block, module, call, None)
    largest = max(1e-3, *(float(tensor.abs().max()) for _, tensor in seen))
    changes = [_signs(seen[0][1], size * largest, seed) for seed, size in enumerate(STEPS)]
    moved = [_passing(block, module, call, change) for change in changes]
    found = Site(f"{prefix}.{layer}".strip("."), "out")
    for (name, own), *others in zip(seen, *moved, strict=False):
        if any(other != name for other, _ in others):
            break
        gates = [
            (tensor.double() - own.double()) / change.double()
            for (_, tensor), change in zip(others, changes, strict=True)
        ]
        site = _site_of(gates, name, prefix)
        found = found if site is None else site
    return found


def _site_of(gates: Sequence[Tensor], name: tuple[str, Any, int], prefix: str) -> Site | None:
    first, second = gates
    largest = float(first.abs().max())
    if not (largest > 0 and float((first - second).abs().max()) <= TOLERANCE * largest):
        return None
    path, side, place = name
    low, high = float(first.min()), float(first.max())
    gated = high - low > TOLERANCE * largest
    return Site(f"{prefix}.{path}".strip("."), side, place, gated, (low + high) / 2)


def _in_float32(value: Any) -> Any:
    """Nested arguments with float32 in place of other floating-point tensors."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _in_float32(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_in_float32(part) for part in value)
    return value


def _signs(like: Tensor, size: float, seed: int) -> Tensor:
    """A random sign times `size` for each entry."""
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, tuple(like.shape), generator=generator) - 1
    return size * signs.to(like)


Name = tuple[str, Any, int]


def _passing(
    block: nn.Module, layer: nn.Module, call: tuple[tuple, dict], change: Tensor | None
) -> list[tuple[Name, Tensor]]:
    """What of the shape of the layer's output enters and leaves modules after it, in order."""
    passing: list[tuple[Name, Tensor]] = []
    shapes: list[torch.Size] = []

    def note(path: str, side: str, value: Any) -> None:
        for place, tensor in enumerate(tensors_in(value) if shapes else []):
            if tensor.shape == shapes[0]:
                passing.append(((path, side, place), tensor.clone()))

    def begin(_module: nn.Module, _args: Any, y: Tensor) -> Tensor:
        shapes.append(y.shape)
        return y if change is None else y + change.to(y)

    handles = [layer.register_forward_hook(begin)]
    for path, module in block.named_modules():
        handles += _noting(path, module, note)
    try:
        with torch.inference_mode():
            block(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    return passing


def _noting(path: str, module: nn.Module, note: Callable[[str, str, Any], None]) -> list[Any]:
    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        note(path, "in", (args, kwargs))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        note(path, "out", output)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
