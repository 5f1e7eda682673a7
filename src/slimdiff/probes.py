"""Probes: a few of the denoiser's own inputs, kept to measure its output error on.

A probe is one row of one call: latents, timestep and conditioning. Rows that share latents and
timestep are halves of one guided prediction (classifier-free guidance): they belong to one *point*
of a trajectory, and are kept or left out together. Of every timestep the point with the smallest
hash of its content is kept first, then the second smallest, and so on: a sample that is spread over
the timesteps, and that depends neither on the order in which rows are seen nor on how the work was
split. Two reservoirs merge into the one of their union.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimdiff.calls import digest_of, fingerprints, flatten, item_of, nest, row_of


@dataclass(frozen=True)
class Probe:
    """The keyword arguments of a denoiser call with a batch of one.

    Attributes:
        key: hash of the whole row.
        tensors: argument path (`added_cond_kwargs/time_ids`) -> tensor with a batch of 1, or
            one that has no batch (positions).
        constants: argument path -> JSON value; a list that has an item for each row has one.
        point: hash of latents and timestep, which the halves of a guided prediction share; of a
            text encoder's row, which has neither, that of the row.
        prompt: hash of the conditioning: all but latents and timestep.
        order: of the rows of its point, which came first in its call.
    """

    key: str
    tensors: dict[str, Tensor]
    constants: dict[str, Any] = field(default_factory=dict)
    point: str = ""
    prompt: str = ""
    order: int = 0

    @property
    def timestep(self) -> float | None:
        """Where on the way from noise to image it is, if the denoiser was told."""
        return _timesteps(self.tensors, 1)[0]


@dataclass
class Probes:
    """A reservoir of at most `capacity` points of trajectories.

    Attributes:
        capacity: points, each of one row, or of a row for each half of guidance.
        seed: chooses them.
        rows: key -> probe.
        guidance: the scale g of the guided prediction u + g (c - u) that the rows of a point make;
            None where they were not guided, or nobody knows.
    """

    capacity: int
    seed: int = 0
    rows: dict[str, Probe] = field(default_factory=dict)
    guidance: float | None = None

    def offer(self, arguments: Mapping[str, Any]) -> None:
        """Consider every row of one denoiser call, given by its keyword arguments."""
        tensors, constants = flatten(arguments)
        batch = next((t.shape[0] for t in tensors.values() if t.ndim > 1), 0)
        named = self._names(tensors, constants, batch)
        times = _timesteps(tensors, batch)
        offered = {point: time for (_, point, _), time in zip(named, times, strict=True)}
        kept = set(self._first(self._times() | offered))
        places: Counter[str] = Counter()
        rows = []
        for row, (key, point, prompt) in enumerate(named):
            if point in kept and key not in self.rows:
                own = {p: row_of(t, row, batch).detach().cpu().clone() for p, t in tensors.items()}
                fixed = {path: item_of(value, row, batch) for path, value in constants.items()}
                rows.append(Probe(key, own, fixed, point, prompt, places[point]))
            places[point] += 1
        self._keep(rows)

    def merge(self, others: Iterable[Probes]) -> None:
        """Take in the rows of other reservoirs."""
        for other in others:
            self._keep(other.rows.values())
            self.guidance = other.guidance if self.guidance is None else self.guidance

    def calls(self, size: int) -> list[list[Probe]]:
        """The probes of each of the calls that `batches` makes, in the order of their rows."""
        alike: dict[str, list[Probe]] = {}
        for probe in sorted(self.rows.values(), key=lambda p: (p.point, p.order, p.key)):
            alike.setdefault(_signature(probe), []).append(probe)
        return [
            probes[start : start + size]
            for probes in alike.values()
            for start in range(0, len(probes), size)
        ]

    def batches(self, size: int, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
        """The probes as keyword arguments of denoiser calls, at most `size` rows each.

        Rows whose shapes differ go into different calls.
        """
        return [_joined(probes, device) for probes in self.calls(size)]

    def unguided_prompt(self) -> str | None:
        """The conditioning of the half that sees no prompt; None where there is no such half.

        It is the same for most prompts. Where all are equally frequent, as with a single prompt, it
        is that of the first row, where pipelines put it.
        """
        paired = Counter(probe.point for probe in self.rows.values())
        seen: Counter[str] = Counter()
        for probe in sorted(self.rows.values(), key=lambda p: (p.order, p.key)):
            if paired[probe.point] > 1:
                seen[probe.prompt] += 1
        return max(seen, key=lambda prompt: seen[prompt]) if seen else None

    def prompts(self) -> dict[str, str]:
        """Point -> the prompt that it was drawn for: the conditioning that is not the empty one."""
        empty = self.unguided_prompt()
        found: dict[str, str] = {}
        for probe in self.rows.values():
            if probe.prompt != empty or probe.point not in found:
                found[probe.point] = probe.prompt
        return found

    def halves(self) -> tuple[Probes, Probes]:
        """The points to choose widths by, and others to judge by, both spread over the timesteps.

        They are of different prompts wherever there is more than one; a single point is in both.
        """
        of, times = self.prompts(), self._times()
        texts = sorted(set(of.values()), key=lambda text: digest_of(str(self.seed), text))
        if len(texts) > 1:
            sides = _shared_out([[p for p in of if of[p] == text] for text in texts])
        else:
            order = sorted(of, key=lambda point: (times[point] or 0.0, point))
            sides = set(order[::2]), set(order[1::2] or order)
        chosen, judging = (self.only(side) for side in sides)
        return chosen, judging

    def only(self, points: set[str]) -> Probes:
        """The probes of these points."""
        rows = {key: probe for key, probe in self.rows.items() if probe.point in points}
        return Probes(self.capacity, self.seed, rows, self.guidance)

    def described(self) -> dict[str, Any]:
        """All but the tensors, as JSON."""
        names = ("constants", "point", "prompt", "order")
        rows = {key: {n: getattr(p, n) for n in names} for key, p in self.rows.items()}
        own = ("capacity", "seed", "guidance")
        return {name: getattr(self, name) for name in own} | {"rows": rows}

    @classmethod
    def restored(
        cls, described: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
    ) -> Probes:
        """What `described` described, with its tensors `<name>/<key>/<path>`."""
        rows = {}
        for key, own in described["rows"].items():
            prefix = f"{name}/{key}/"
            found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            rows[key] = Probe(key, found, **own)
        return cls(described["capacity"], described["seed"], rows, described["guidance"])

    def _keep(self, probes: Iterable[Probe]) -> None:
        self.rows |= {probe.key: probe for probe in probes}
        kept = set(self._first(self._times()))
        rows = sorted(self.rows.values(), key=lambda p: (p.point, p.order, p.key))
        self.rows = {probe.key: probe for probe in rows if probe.point in kept}

    def _times(self) -> dict[str, float | None]:
        return {probe.point: probe.timestep for probe in self.rows.values()}

    def _first(self, times: Mapping[str, float | None]) -> list[str]:
        """The points that stay, of these with their timesteps: all first, then all second ..."""
        seen: Counter[float | None] = Counter()
        ranked: list[tuple[int, str]] = []
        for rank, point in sorted((digest_of(str(self.seed), point), point) for point in times):
            ranked.append((seen[times[point]], rank + point))
            seen[times[point]] += 1
        return [name[64:] for _, name in sorted(ranked)[: self.capacity]]

    def _names(
        self, tensors: Mapping[str, Tensor], constants: Mapping[str, Any], batch: int
    ) -> list[tuple[str, str, str]]:
        """Key, point and prompt of every row of a call."""
        hashes = fingerprints(tensors, batch)
        latents = next((path for path, t in tensors.items() if t.ndim > 1), None)
        where = {latents, "timestep"} if "timestep" in tensors else set()
        found = []
        for row in range(batch):
            fixed = {path: item_of(value, row, batch) for path, value in constants.items()}
            own = [f"{path}={values[row]}" for path, values in sorted(hashes.items())]
            rest = [f"{p}={values[row]}" for p, values in sorted(hashes.items()) if p not in where]
            key = digest_of(*own, json.dumps(fixed, sort_keys=True, default=str))
            point = digest_of(*(hashes[path][row] for path in sorted(filter(None, where))))
            found.append((key, point if where else key, digest_of(*rest)))
        return found


def _shared_out(texts: list[list[str]]) -> tuple[set[str], set[str]]:
    """Points of different prompts on two sides that hold about as many; prompts stay whole."""
    sides: tuple[set[str], set[str]] = (set(), set())
    for points in texts:
        min(sides, key=len).update(points)
    return sides


def _timesteps(tensors: Mapping[str, Tensor], batch: int) -> list[float | None]:
    """Of every row of a call; where tokens have timesteps of their own, the first one's."""
    if "timestep" not in tensors:
        return [None] * batch
    found = tensors["timestep"]
    if len(found) != batch:
        return [float(found.flatten()[0])] * batch
    return list(found.reshape(batch, -1)[:, 0].double().tolist())


def _signature(probe: Probe) -> str:
    shapes = {path: [str(t.dtype), *t.shape[1:]] for path, t in sorted(probe.tensors.items())}
    shared = {path: t for path, t in sorted(probe.tensors.items()) if not _has_batch(t)}
    return json.dumps([shapes, fingerprints(shared, 1), probe.constants], sort_keys=True)


def _has_batch(tensor: Tensor) -> bool:
    return tensor.shape[0] == 1


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
