"""Timesteps that sampling does not visit: moments of layers that see little but the timestep.

The input of an adaLN modulation is an embedding of the timestep, to which at most a pooled prompt
is added. Its moment has as many directions as there were steps; a factorisation under it is exact
at these and wrong between them, so a model that was calibrated at one number of steps would err at
another. Such layers see neither latents nor tokens: a few recorded calls, made again at timesteps
spread over the whole range, complete their moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.families import groups_of
from slimdiff.groups import Group
from slimdiff.probes import Probes
from slimdiff.record import recording
from slimdiff.statistics import Statistics

COUNT = 64
"""Timesteps, evenly spread between none and the largest that was seen."""


def sweep_timesteps(
    denoiser: nn.Module,
    groups: Sequence[Group] | None,
    statistics: Statistics,
    inputs: Probes,
    settings: tuple[int, int, int, torch.dtype],
) -> None:
    """Add what modulations see at `COUNT` timesteps, weighing as much as what is there.

    Args:
        denoiser: runs `COUNT` rows.
        groups: what is recorded; all of the denoiser's by default.
        statistics: hold moments of at least one call.
        inputs: calls to make again; without timesteps, nothing is done.
        settings: as `recording` takes them.
    """
    known = groups_of(denoiser) if groups is None else groups
    modulations = [group for group in known if group.kind == "modulation"]
    times = [p.timestep for p in inputs.rows.values() if p.timestep is not None]
    if not modulations or not times:
        return
    before = dict(statistics.weights)
    calls = inputs.batches(8, next(denoiser.parameters()).device)
    swept = Statistics(statistics.denoiser, Probes(0))
    with recording(denoiser, modulations, swept, *settings) as adding:
        adding.reservoir = None
        done = 0
        while done < COUNT:
            for call in calls:
                rows = len(next(x for x in _tensors(call) if x.ndim > 1))
                places = torch.arange(done, done + rows) % COUNT
                denoiser(**call | {"timestep": _spread(call["timestep"], places, max(times))})
                done += rows
    for name, total in swept.sums.items():
        if name in before and not name.endswith("/influence") and swept.weights[name]:
            factor = before[name] / swept.weights[name]
            with torch.inference_mode():
                statistics.add(name, factor * total, before[name])


def _spread(like: Tensor, places: Tensor, largest: float) -> Tensor:
    """Timesteps (rows,) at these of `COUNT` even places in (0, largest], of the kind of `like`."""
    times = (places + 1).double() * largest / COUNT
    if not like.is_floating_point():
        times = times.round()
    times = times.to(like.device, like.dtype)
    return times.view(-1, *[1] * (like.ndim - 1)).expand(len(places), *like.shape[1:])


def _tensors(call: dict[str, Any]) -> list[Tensor]:
    return [value for value in call.values() if isinstance(value, Tensor)]
