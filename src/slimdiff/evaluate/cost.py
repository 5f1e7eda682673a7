"""Cost: parameters, MACs, bytes, memory and latency of the dense and the slim pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimdiff import costs
from slimdiff.denoiser import denoiser_of
from slimdiff.errors import SlimdiffError
from slimdiff.evaluate.latency import Timing, interleaved
from slimdiff.evaluate.memory import activation_peak, folder_bytes, weight_bytes
from slimdiff.evaluate.sampling import generate
from slimdiff.evaluate.settings import Settings

Progress = Callable[[str, int, int], None]


def measure_cost(
    dense: Any,
    slim: Any,
    call: Mapping[str, Any],
    one_row: Mapping[str, Any],
    prompt: str,
    settings: Settings,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The section `cost` of results.

    Args:
        dense, slim: pipelines on one device.
        call: keyword arguments of a denoiser call, as the pipeline makes it for one image.
        one_row: those for a batch of one, to count MACs on.
        prompt: for the pipeline's latency.
        settings: sampling, and how often to time.
        progress: called with (stage, done, in all).
    """
    pipes = {"dense": dense, "slim": slim}
    denoisers = {label: denoiser_of(pipe)[1] for label, pipe in pipes.items()}
    section: dict[str, Any] = {
        "params": {label: costs.parameters(m) for label, m in denoisers.items()},
        "macs": _macs(denoisers, one_row),
        "bytes": {label: _bytes(pipe) for label, pipe in pipes.items()},
        "peak_memory": {label: _peak(m, call) for label, m in denoisers.items()},
    }
    if progress is not None:
        progress("latency", 0, 1)
    section["latency"] = _latency(pipes, denoisers, call, prompt, settings)
    if progress is not None:
        progress("latency", 1, 1)
    if "unavailable" not in section["macs"]:
        allowed = section["macs"]["dense"] / section["macs"]["slim"]
        section["macs_allow"] = allowed
        section["share_reached"] = section["latency"]["denoiser"]["speedup"] / allowed
    return section


def _macs(denoisers: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {label: costs.measure(m, [], inputs).macs for label, m in denoisers.items()}
    except SlimdiffError as error:
        return {"unavailable": str(error)}


def _bytes(pipe: Any) -> int:
    """The denoiser's files on disk, or its weights where no folder is known."""
    name, denoiser = denoiser_of(pipe)
    folder = Path(str(getattr(pipe, "name_or_path", None) or "missing")) / name
    return folder_bytes(folder) or weight_bytes(denoiser)


def _peak(denoiser: nn.Module, call: Mapping[str, Any]) -> int:
    device = next(denoiser.parameters()).device
    return weight_bytes(denoiser) + activation_peak(_calling(denoiser, call), device)


def _calling(denoiser: nn.Module, call: Mapping[str, Any]) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return denoiser(**call)

    return run


def _latency(
    pipes: Mapping[str, Any],
    denoisers: Mapping[str, nn.Module],
    call: Mapping[str, Any],
    prompt: str,
    settings: Settings,
) -> dict[str, Any]:
    device = next(denoisers["dense"].parameters()).device
    calls = {label: _calling(m, call) for label, m in denoisers.items()}
    rows = max((len(t) for t in call.values() if isinstance(t, torch.Tensor) and t.ndim), default=1)
    found = {
        "denoiser": _row(
            interleaved(calls, runs=settings.runs, warmup=2, device=device),
            f"one denoiser call, batch {rows}",
        )
    }
    if settings.pipeline_runs:
        whole = {label: _drawing(pipe, prompt, settings) for label, pipe in pipes.items()}
        found["pipeline"] = _row(
            interleaved(whole, runs=settings.pipeline_runs, warmup=0, device=device),
            f"one image, {settings.num_inference_steps} steps",
        )
    return found


def _drawing(pipe: Any, prompt: str, settings: Settings) -> Callable[[], object]:
    return lambda: generate(pipe, [prompt], [settings.first_seed], **settings.sampling)


def _row(timings: Mapping[str, Timing], of: str) -> dict[str, Any]:
    dense, slim = timings["dense"], timings["slim"]
    return {
        "dense": dense.median,
        "slim": slim.median,
        "speedup": dense.median / slim.median,
        "runs": len(dense.seconds),
        "of": of,
    }
