"""Is fewer MACs less time? Dense and slim UNets of real size, timed in turn in one process.

    python benchmarks/speed.py sd15
    python benchmarks/speed.py sdxl --dtype bfloat16
    python benchmarks/speed.py sdxl --recording 128 --calls 5 --runs 1

Random weights; every attention and feed-forward layer keeps the same share of its width (no
statistics are needed for shapes). Also the seconds to save and to load; or, at latents of some
size, what recording adds to a denoiser call.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimdiff
from measuring import write
from peers.job import Job, become_slim, entries_of, removable, uniform_sizes
from shapes import SHAPES, Shape, build, inputs
from slimdiff import costs
from slimdiff.config import TRANSFORMER
from slimdiff.evaluate import interleaved

SHARES = (0.41, 0.60)
CALLS = 20
"""Denoiser calls of one batch of prompts."""


def narrowed(unet: Any, share: float) -> Any:
    """A UNet of uniform widths with `share` of attention and feed-forward gone; random weights."""
    from types import SimpleNamespace

    groups = slimdiff.groups_of(unet, TRANSFORMER)
    pipe = SimpleNamespace(unet=unet)
    statistics = slimdiff.Statistics("", slimdiff.statistics.Probes(1))
    job = Job(pipe, statistics, None, [], {}, int(share * removable(unet)))
    entries = entries_of(groups, uniform_sizes(job))
    plan = slimdiff.Plan(type(unet).__name__, "slimdiff", entries, "uniform")
    slim = copy.deepcopy(unet)
    for group in groups:
        entry = entries[group.name]
        inner = entry.heads * entry.width
        for role, path in group.paths.items():
            _narrow(slim.get_submodule(path), role, inner * (1 + (role == "up" and group.gated)))
    return become_slim(slim, unet, plan)


def _narrow(linear: nn.Linear, role: str, inner: int) -> None:
    """Cut a linear's inner side down to `inner`."""
    if role in ("out", "down"):
        linear.in_features = inner
        linear.weight = nn.Parameter(linear.weight[:, :inner].detach().clone())
        return
    linear.out_features = inner
    linear.weight = nn.Parameter(linear.weight[:inner].detach().clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[:inner].detach().clone())


def calling(unet: Any, call: dict[str, Any]) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            unet(**call)

    return run


def overhead(unet: Any, shape: Shape, runs: int, calls: int = CALLS) -> dict[str, Any]:
    """Seconds of a denoiser call, plain and recorded, at batch 2 (guidance), after warm-up.

    Several calls are recorded at once, as calibration does: rows of wide layers wait for others.
    """
    one = inputs(shape, 0)
    call = {
        name: value.repeat(2, *[1] * (value.ndim - 1)) if getattr(value, "ndim", 0) else value
        for name, value in one.items()
        if name != "added_cond_kwargs"
    }
    if "added_cond_kwargs" in one:
        extra = one["added_cond_kwargs"]
        call["added_cond_kwargs"] = {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in extra.items()}
    with slimdiff.record(unet, dtype=torch.float32) as statistics:  # the first call takes more in
        unet(**call)

    def plain() -> None:
        with torch.inference_mode():
            for _ in range(calls):
                unet(**call)

    def recorded() -> None:
        with slimdiff.record(unet, statistics=statistics, dtype=torch.float32):
            for _ in range(calls):
                unet(**call)

    found = interleaved({"plain": plain, "recorded": recorded}, runs=runs, warmup=0)
    return {
        "calls": calls,
        "plain_seconds": found["plain"].median / calls,
        "recorded_seconds": found["recorded"].median / calls,
        "overhead": 1 / found["plain"].speedup_of(found["recorded"]) - 1,
    }


def only_recording(unet: Any, shape: Shape, options: argparse.Namespace) -> None:
    """Write what recording adds at another size."""
    found: dict[str, Any] = {"model": options.model, "latents": shape.latents}
    found["runs"] = options.runs
    found |= {"dtype": str(shape.dtype).removeprefix("torch.")}
    found |= overhead(unet, shape, options.runs, options.calls)
    write(f"recording-{options.model}-{shape.latents}", found)


def save_and_load(unet: Any) -> dict[str, float]:
    """Seconds to save a slim denoiser and to load it."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        slimdiff.save(unet, Path(folder) / "slim")
        saved = time.perf_counter()
        slimdiff.load(Path(folder) / "slim")
        loaded = time.perf_counter()
    return {"save_seconds": round(saved - start, 1), "load_seconds": round(loaded - saved, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--recording", type=int, help="only what recording adds, at these latents")
    parser.add_argument("--calls", type=int, default=CALLS, help="that are recorded at once")
    options = parser.parse_args()
    shape = SHAPES[options.model]
    if options.dtype:
        shape = Shape(shape.config, getattr(torch, options.dtype), shape.latents)
    unet = build(shape).to(memory_format=torch.channels_last)
    if options.recording:
        only_recording(unet, replace(shape, latents=options.recording), options)
        return
    call = inputs(shape, 0)
    dense_macs = costs.measure(unet, [], call).macs
    rows = []
    for share in SHARES:
        slim = narrowed(unet, share).to(memory_format=torch.channels_last)
        calls = {"dense": calling(unet, call), "slim": calling(slim, call)}
        found = interleaved(calls, runs=options.runs, warmup=1)
        allowed = dense_macs / costs.measure(slim, [], call).macs
        speedup = found["dense"].speedup_of(found["slim"])
        row = {
            "removed": share,
            "params": costs.parameters(slim),
            "dense_seconds": found["dense"].median,
            "slim_seconds": found["slim"].median,
            "speedup": speedup,
            "macs_allow": allowed,
            "share_reached": speedup / allowed,
        }
        if share == SHARES[0]:
            row |= save_and_load(slim)
        print(row, flush=True)
        rows.append(row)
    dtype = str(shape.dtype).removeprefix("torch.")
    write(
        f"speed-{options.model}-{dtype}",
        {
            "model": options.model,
            "dtype": dtype,
            "latents": shape.latents,
            "params": costs.parameters(unet),
            "runs": options.runs,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
