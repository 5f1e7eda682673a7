"""Is the speed that was asked for there? Latency budgets on UNets of real size, random weights.

    python benchmarks/faster.py sd15
    python benchmarks/faster.py sd15 --dtype bfloat16
    python benchmarks/faster.py sdxl --allocation uniform

Every layer is timed at several widths on this machine, attention with fewer heads too, upsamplers
fused and not. Layers keep what loses least in that time by error curves that were measured on the
model in bfloat16 with 32 by 32 latents (probed; no layer goes wholly, for what a random one is
worth says little), or all the same share of their width (uniform). Dense and slim are timed once
more in turn at the end, apart from the search.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import slimdiff
from measuring import write
from shapes import SHAPES, Shape, build, inputs
from slimdiff import costs
from slimdiff.bundles import Allocation
from slimdiff.config import RECIPES
from slimdiff.curves import ErrorCurve
from slimdiff.fitting import fit_speedup, timed
from slimdiff.layer_timing import narrowed
from slimdiff.planning import make_plan
from slimdiff.prices import least_nanoseconds
from slimdiff.profiling import profile
from slimdiff.shapes import slim_config
from slimdiff.statistics import Probes, Statistics
from slimdiff.widths import measure_curves

WANTED, CURVE_LATENTS = (1.5, 2.0), 32


def curves_of(shape: Shape, folder: Path) -> dict[str, ErrorCurve]:
    """Error curves and gains under random weights, kept in a folder."""
    small = replace(shape, dtype=torch.bfloat16, latents=min(shape.latents, CURVE_LATENTS))
    unet = build(small)
    recording = slimdiff.record(unet, num_probes=2, dtype=torch.float32)
    with recording as statistics, torch.no_grad():
        for seed in range(2):
            unet(**inputs(small, seed))
    return measure_curves(unet, statistics, folder=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None)
    parser.add_argument("--multiple", type=int, default=8)
    parser.add_argument("--latents", type=int, default=None)
    parser.add_argument("--allocation", choices=("probed", "uniform"), default="probed")
    parser.add_argument("--all-heads", action="store_true", help="no head goes")
    parser.add_argument("--profiles", type=Path, help="folder where a profile is kept")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    options = parser.parse_args()
    shape = SHAPES[options.model]
    dtype = getattr(torch, options.dtype) if options.dtype else shape.dtype
    shape = replace(shape, dtype=dtype, latents=options.latents or shape.latents)
    settings = Allocation(
        options.allocation, multiple=options.multiple, heads=not options.all_heads
    )
    curves: dict[str, ErrorCurve] = {}
    if options.allocation == "probed":
        curves = curves_of(shape, options.work / f"faster-{options.model}")
    unet, call = build(shape).to(memory_format=torch.channels_last), inputs(shape, 0)
    groups, recipe = slimdiff.groups_of(unet), RECIPES["slimdiff"]
    start = time.perf_counter()
    times = profile(unet, groups, call, multiple=options.multiple, folder=options.profiles)
    seconds = round(time.perf_counter() - start, 1)
    print(f"profile: {seconds} s, dense call {times.seconds:.2f} s", flush=True)
    fused = tuple(times.fused)
    dense = costs.measure(unet, groups, call, fused)

    def plan(wanted: float, limit: int) -> slimdiff.Plan:
        budget, nothing = slimdiff.Budget(speedup=wanted), Statistics("", Probes(1))
        parts = (groups, dense, curves, nothing, budget, recipe, settings)
        return make_plan(type(unet).__name__, *parts, fused=fused, profile=times, limit=limit)

    def measured(wanted: float) -> dict[str, Any]:
        least = least_nanoseconds(groups, recipe, settings, curves, times)
        found = fit_speedup(
            lambda limit: plan(wanted, limit),
            lambda made: timed(unet, groups, made, call),
            times.dense_nanoseconds,
            least,
            wanted,
        )
        again = timed(unet, groups, found, call)
        slim = narrowed(unet, slim_config(unet, groups, found.entries, found.fused))
        allowed = dense.macs / costs.measure(slim, [], call).macs
        return {
            "wanted": wanted,
            "params": costs.parameters(slim),
            "macs": costs.measure(slim, [], call).macs,
            "dense_seconds": again.dense,
            "slim_seconds": again.slim,
            "speedup": again.speedup,
            "speedup_in_search": found.figures["latency"]["speedup"],
            "macs_allow": allowed,
            "share_reached": again.speedup / allowed,
            "upsamplers_fused": len(fused),
            "heads_removed": found.figures.get("heads_removed", 0),
            "heads": sum(group.heads for group in groups if group.kind == "value_output"),
        }

    rows = []
    for wanted in WANTED:
        try:
            rows.append(measured(wanted))
        except slimdiff.SlimdiffError as error:
            rows.append({"wanted": wanted, "unavailable": str(error)})
        print(rows[-1], flush=True)
    name = str(shape.dtype).removeprefix("torch.")
    how = f"{options.allocation}{'-all-heads' if options.all_heads else ''}"
    write(
        f"faster-{options.model}-{name}-{how}",
        {
            "model": options.model,
            "dtype": name,
            "latents": shape.latents,
            "params": dense.params,
            "macs": dense.macs,
            "multiple": options.multiple,
            "allocation": options.allocation,
            "all_heads": options.all_heads,
            "profile_seconds": seconds,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
