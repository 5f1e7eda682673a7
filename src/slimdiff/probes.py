"""Probes: a few of the denoiser's own inputs, kept to measure its output error on later.

A probe is one row of one call: latents, timestep and conditioning. Of every timestep the row with
the smallest hash of its content is kept first, then the second smallest, and so on: a sample that
is spread over the timesteps, and that depends neither on the order in which rows are seen nor on
how the work was split. Two reservoirs merge into the one of their union.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HASHED_VALUES = 256
PLACE = "#"
"""Begins the name of an item of a list or tuple argument: `image_rotary_emb/#0`."""


@dataclass(frozen=True)
class Probe:
    """The keyword arguments of a denoiser call with a batch of one.

    Attributes:
        key: hash of the content; of every timestep the reservoir keeps the smallest.
        tensors: argument path (`added_cond_kwargs/time_ids`) -> tensor with a batch of 1, or
            one that has no batch (positions).
        constants: argument path -> JSON value; a list that has an item for each row has one.
    """

    key: str
    tensors: dict[str, Tensor]
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def timestep(self) -> float | None:
        """Where on the way from noise to image it is, if the denoiser was told."""
        return _timestep(self.tensors)


@dataclass
class Probes:
    """A reservoir of at most `capacity` probes."""

    capacity: int
    seed: int = 0
    rows: dict[str, Probe] = field(default_factory=dict)

    def offer(self, arguments: Mapping[str, Any]) -> None:
        """Consider every row of one denoiser call, given by its keyword arguments."""
        tensors, constants = flatten(arguments)
        batch = next((t.shape[0] for t in tensors.values() if t.ndim > 1), 0)
        for row in range(batch):
            sliced = {path: _row(tensor, row, batch) for path, tensor in tensors.items()}
            key = self._key(sliced)
            times = {known: probe.timestep for known, probe in self.rows.items()}
            if key not in self.rows and key in self._first(times | {key: _timestep(sliced)}):
                kept = {path: tensor.detach().cpu().clone() for path, tensor in sliced.items()}
                own = {path: _item(value, row, batch) for path, value in constants.items()}
                self._keep([Probe(key, kept, own)])

    def merge(self, others: Iterable[Probes]) -> None:
        """Take in the rows of other reservoirs."""
        for other in others:
            self._keep(other.rows.values())

    def batches(self, size: int, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
        """The probes as keyword arguments of denoiser calls, at most `size` rows each.

        Rows whose shapes differ go into different calls.
        """
        alike: dict[str, list[Probe]] = {}
        for _, probe in sorted(self.rows.items()):
            alike.setdefault(_signature(probe), []).append(probe)
        return [
            _joined(probes[start : start + size], device)
            for probes in alike.values()
            for start in range(0, len(probes), size)
        ]

    def halves(self) -> tuple[Probes, Probes]:
        """The probes to choose widths by, and others to judge by, both spread over the timesteps.

        A single probe is in both.
        """
        order = sorted(self.rows.items(), key=lambda row: (row[1].timestep or 0.0, row[0]))
        parts = dict(order[::2]), dict(order[1::2] or order)
        chosen, judging = (Probes(self.capacity, self.seed, rows) for rows in parts)
        return chosen, judging

    def _keep(self, probes: Iterable[Probe]) -> None:
        rows = self.rows | {probe.key: probe for probe in probes}
        kept = self._first({key: probe.timestep for key, probe in rows.items()})
        self.rows = {key: rows[key] for key in kept}

    def _first(self, times: Mapping[str, float | None]) -> list[str]:
        """The keys that are kept, of those with their timesteps: all first ones, all second ..."""
        seen: Counter[float | None] = Counter()
        ranked: list[tuple[int, str]] = []
        for key in sorted(times):
            ranked.append((seen[times[key]], key))
            seen[times[key]] += 1
        return [key for _, key in sorted(ranked)[: self.capacity]]

    def _key(self, tensors: Mapping[str, Tensor]) -> str:
        digest = hashlib.sha256(str(self.seed).encode())
        for path, tensor in sorted(tensors.items()):
            values = tensor.detach().flatten()[:HASHED_VALUES].double().cpu()
            digest.update(path.encode() + values.numpy().tobytes())
        return digest.hexdigest()


def bound(signature: inspect.Signature, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, those that the signature only knows as `**kwargs` too."""
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict]:
    """Tensors and JSON constants of nested keyword arguments, by slash-separated path.

    `None`, `return_dict` and what is neither tensor nor constant are left out.
    """
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in arguments.items():
        path = f"{prefix}{name}"
        if isinstance(value, Tensor):
            tensors[path] = value.reshape(1) if value.ndim == 0 else value
        elif path == "timestep" and isinstance(value, int | float):
            tensors[path] = torch.tensor([value])
        elif isinstance(value, Mapping):
            inner, fixed = flatten(value, f"{path}/")
            tensors |= inner
            constants |= fixed
        elif isinstance(value, list | tuple) and _holds_tensors(value):
            parts = {f"{PLACE}{place}": part for place, part in enumerate(value)}
            inner, fixed = flatten(parts, f"{path}/")
            tensors |= inner
            constants |= fixed
        elif isinstance(value, bool | int | float | str | list | tuple) and name != "return_dict":
            constants[path] = value
    return tensors, constants


def _holds_tensors(value: Sequence[Any]) -> bool:
    return any(isinstance(part, Tensor) for part in value)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested arguments that `flatten` took apart."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return {name: _listed(value) for name, value in nested.items()}


def _listed(value: Any) -> Any:
    """A tuple where all names are places, else as it is."""
    if not isinstance(value, dict):
        return value
    inner = {name: _listed(part) for name, part in value.items()}
    if inner and all(name.startswith(PLACE) for name in inner):
        return tuple(inner[f"{PLACE}{place}"] for place in range(len(inner)))
    return inner


def _item(value: Any, row: int, batch: int) -> Any:
    return [value[row]] if isinstance(value, list) and len(value) == batch else value


def _timestep(tensors: Mapping[str, Tensor]) -> float | None:
    return float(tensors["timestep"].flatten()[0]) if "timestep" in tensors else None


def _row(tensor: Tensor, row: int, batch: int) -> Tensor:
    return tensor[row : row + 1] if tensor.shape[0] == batch else tensor


def _signature(probe: Probe) -> str:
    shapes = {path: [str(t.dtype), *t.shape[1:]] for path, t in sorted(probe.tensors.items())}
    shared = {path: _digest(t) for path, t in sorted(probe.tensors.items()) if not _has_batch(t)}
    return json.dumps([shapes, shared, probe.constants], sort_keys=True)


def _has_batch(tensor: Tensor) -> bool:
    return tensor.shape[0] == 1


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.double().numpy().tobytes()).hexdigest()


def _joined(probes: list[Probe], device: torch.device | str) -> dict[str, Any]:
    first = probes[0]
    tensors = {
        path: (
            torch.cat([probe.tensors[path] for probe in probes]) if _has_batch(tensor) else tensor
        ).to(device)
        for path, tensor in first.tensors.items()
    }
    constants = {
        path: value * len(probes) if isinstance(value, list) and len(value) == 1 else value
        for path, value in first.constants.items()
    }
    return nest(tensors | constants) | {"return_dict": False}
