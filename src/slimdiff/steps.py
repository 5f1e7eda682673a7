"""Steps: where on the way from noise to picture a denoiser call is.

Calls are not steps: samplers of second order call the denoiser twice in a step, some pipelines once
for each half of guidance. What tells is the timestep's place among those of the scheduler.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.calls import bound, signature_of
from slimdiff.recorder import Recorder

CONVENTIONS: tuple[Callable[[float, float], float], ...] = (
    lambda t, count: t,
    lambda t, count: t * count,  # from 1 to 0, as flow models are told
    lambda t, count: (1 - t) * count,  # the other way round
    lambda t, count: count - t,
)
"""What pipelines may make of the scheduler's timestep before they tell the denoiser: the way back,
by the timesteps of its training."""

CLOSE = 0.01
"""Of all that timesteps span: how far off one may be, in half precision."""


def step_weight(step: int, steps: int, lowest: float = 0.5, highest: float = 1.5) -> float:
    """Log-decreasing weight of denoising step 1..steps (OBS-Diff, eq. 4); `highest` at step 1."""
    if steps == 1:
        return highest
    position = math.log(max(steps - step + 1, 1)) / math.log(steps)
    return lowest + (highest - lowest) * position


class Steps:
    """Places of denoiser calls among the steps of a sampling run.

    Args:
        pipe: its scheduler's timesteps are looked up when a call is placed.
        count: steps of the run, for a denoiser that is told something else than those timesteps:
            its steps are then in the order in which they first appear.
    """

    def __init__(self, pipe: Any, count: int) -> None:
        self._scheduler, self._count = getattr(pipe, "scheduler", None), count
        self._read: Tensor | None = None
        self._times: list[float] = []
        self._convention: Callable[[float, float], float] | None = None
        self._seen: list[float] = []

    def place(self, timestep: Any) -> tuple[int, int]:
        """Which step, from 1, of how many, a call with this timestep is in.

        Where its rows or tokens have timesteps of their own, the largest one's.
        """
        told = torch.as_tensor(timestep).max().double().item()
        if told not in self._seen:
            self._seen.append(told)
        self._refresh()
        if self._convention is None:
            return min(self._seen.index(told) + 1, self._count), self._count
        time = self._convention(told, self._train)
        nearest = min(self._times, key=lambda own: abs(own - time))
        return self._times.index(nearest) + 1, len(self._times)

    @property
    def _train(self) -> float:
        config = getattr(self._scheduler, "config", {})
        return float(getattr(config, "num_train_timesteps", 1000))

    def _refresh(self) -> None:
        """Look the scheduler's timesteps up where a new run has set them, and how they are told."""
        now = getattr(self._scheduler, "timesteps", None)
        if now is self._read or not isinstance(now, Tensor) or not now.numel():
            return
        self._read = now
        times = now.double().flatten().tolist()
        self._times = sorted(set(times), reverse=times[0] >= times[-1])
        self._convention, self._seen = self._fitting(self._seen[-1]), self._seen[-1:]

    def _fitting(self, told: float) -> Callable[[float, float], float] | None:
        """The convention under which the first call is at one of the timesteps, if any is."""
        spread = max(map(abs, self._times))
        distances = {
            make: min(abs(own - make(told, self._train)) for own in self._times)
            for make in CONVENTIONS
        }
        best = min(distances, key=lambda make: distances[make])
        return best if distances[best] <= CLOSE * spread else None


@contextlib.contextmanager
def weighing(recorder: Recorder, denoiser: nn.Module, steps: Steps | None) -> Iterator[None]:
    """Set the recorder's weight before each denoiser call; without steps all weigh the same."""
    if steps is None:
        yield
        return
    signature = signature_of(denoiser)

    def weigh(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        timestep = bound(signature, args, kwargs)["timestep"]
        recorder.weight = step_weight(*steps.place(timestep))

    handle = denoiser.register_forward_pre_hook(weigh, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
