"""Latency: calls timed in turn, so that what else the machine does slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from slimdiff.errors import SlimdiffError

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of every run of one call, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median run in seconds."""
        return median(self.seconds)

    def speedup_of(self, other: Timing) -> float:
        """How many times faster `other` is: the median over rounds of this run over that one."""
        return median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def interleaved(
    calls: Mapping[str, Call],
    *,
    runs: int = 11,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time several calls in rounds: each once per round, every other round in reverse order.

    Args:
        calls: name -> what to time.
        runs: rounds that count.
        warmup: rounds before them that do not.
        device: of the work; on CUDA runs are timed by events, elsewhere by the clock.

    Raises:
        SlimdiffError: `runs` is below 1.
    """
    if runs < 1:
        raise SlimdiffError(f"runs must be at least 1, got {runs}")
    timer = _cuda_seconds if torch.device(device).type == "cuda" else _seconds
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(-warmup, runs):
        for name in list(calls) if round_ % 2 == 0 else reversed(list(calls)):
            seconds = timer(calls[name])
            if round_ >= 0:
                taken[name].append(seconds)
    return {name: Timing(tuple(seconds)) for name, seconds in taken.items()}


def enough_runs(seconds: float, total: float = 1.5, fewest: int = 7, most: int = 41) -> int:
    """Rounds that a call of `seconds` is timed in, so that short calls are timed more often."""
    return max(fewest, min(most, round(total / max(seconds, 1e-9))))


def seconds_of(call: Call, device: torch.device | str = "cpu") -> float:
    """Seconds of one run, after one that does not count."""
    return interleaved({"": call}, runs=1, device=device)[""].median


def _seconds(call: Call) -> float:
    if torch.accelerator.is_available():  # such as mps: queued work must not leak into the clock
        torch.accelerator.synchronize()
    start = time.perf_counter()
    call()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _cuda_seconds(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000
