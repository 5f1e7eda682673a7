"""Rows: what the dense denoiser was given and put out, kept in memory to learn from."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.calls import bound, flatten, nest

Batch = tuple[dict[str, Any], Tensor]
"""Keyword arguments of a denoiser call, and what the dense denoiser puts out."""


@dataclass(frozen=True)
class Call:
    """One call of the dense denoiser, on the CPU, in the dtypes that it had.

    Attributes:
        tensors: argument path -> tensor (rows, ...), or one without rows (positions).
        shared: paths of those without rows.
        constants: argument path -> JSON value; a list with an item for each row is one of those.
        output: (rows, ...) of the dense denoiser.
    """

    tensors: dict[str, Tensor]
    shared: frozenset[str]
    constants: dict[str, Any]
    output: Tensor

    def constants_of(self, row: int) -> dict[str, Any]:
        """The constants of one row."""
        rows = len(self.output)
        items = self.constants.items()
        return {k: [v[row]] if isinstance(v, list) and len(v) == rows else v for k, v in items}

    @functools.cached_property
    def kinds(self) -> list[str]:
        """For each row what it has in common with those that it can run together with."""
        shapes = {path: [str(t.dtype), *t.shape[1:]] for path, t in sorted(self.tensors.items())}
        shared = {path: _digest(self.tensors[path]) for path in sorted(self.shared)}
        alike = [shapes, shared, list(self.output.shape[1:])]
        return [
            json.dumps([alike, self.constants_of(row)], sort_keys=True)
            for row in range(len(self.output))
        ]

    def storage(self) -> Iterator[Tensor]:
        """All tensors that it holds."""
        yield from self.tensors.values()
        yield self.output


class Rows:
    """The rows of several calls, to draw from."""

    def __init__(self, calls: Iterable[Call]) -> None:
        self.calls = list(calls)
        self._places = [(c, row) for c in self.calls for row in range(len(c.output))]
        self._kinds = [kind for call in self.calls for kind in call.kinds]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """Memory that they take; what several calls share counts once."""
        held = {id(tensor): tensor for call in self.calls for tensor in call.storage()}
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    def some(self, n: int, generator: torch.Generator) -> list[int]:
        """At most `n` different rows, drawn at random, by their places."""
        return torch.randperm(len(self), generator=generator)[:n].tolist()

    def batches(
        self, places: Iterable[int], at_once: int, device: torch.device | str
    ) -> Iterator[Batch]:
        """Rows as denoiser calls of at most `at_once`; those that differ in shape come apart."""
        alike: dict[str, list[int]] = {}
        for place in places:
            alike.setdefault(self._kinds[place], []).append(place)
        for mine in alike.values():
            for start in range(0, len(mine), at_once):
                yield self._joined(mine[start : start + at_once], device)

    def _joined(self, places: list[int], device: torch.device | str) -> Batch:
        own = [self._places[place] for place in places]
        first, row = own[0]
        tensors = {
            path: (
                tensor
                if path in first.shared
                else torch.cat([call.tensors[path][row : row + 1] for call, row in own])
            ).to(device)
            for path, tensor in first.tensors.items()
        }
        constants = {
            path: value * len(own) if isinstance(value, list) and len(value) == 1 else value
            for path, value in first.constants_of(row).items()
        }
        output = torch.cat([call.output[row : row + 1] for call, row in own])
        return nest(tensors | constants) | {"return_dict": False}, output.to(device)


@contextlib.contextmanager
def recorded(denoiser: nn.Module) -> Iterator[list[Call]]:
    """While `denoiser` runs inside, keep what it is given and puts out."""
    calls: list[Call] = []
    signature = inspect.signature(denoiser.forward)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        arguments = bound(signature, args, kwargs)
        with torch.inference_mode(False), torch.no_grad():  # to be trained on later
            calls.append(_kept(arguments, out[0], calls[-1] if calls else None))

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _kept(arguments: dict[str, Any], output: Tensor, before: Call | None) -> Call:
    """A call on the CPU; what did not change since the call before is not kept twice."""
    tensors, constants = flatten(arguments)
    rows = len(output)
    kept: dict[str, Tensor] = {}
    shared: set[str] = set()
    for path, tensor in tensors.items():
        own = tensor.detach().to("cpu", copy=True)
        if len(own) == 1:
            own = own.expand(rows, *own.shape[1:])
        elif len(own) != rows:
            shared.add(path)
        last = None if before is None else before.tensors.get(path)
        same = last is not None and last.dtype == own.dtype and torch.equal(last, own)
        kept[path] = last if last is not None and same else own
    return Call(kept, frozenset(shared), constants, output.detach().to("cpu", copy=True))


def _digest(tensor: Tensor) -> str:
    values = tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
