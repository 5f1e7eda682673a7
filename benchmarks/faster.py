"""Is the speed that was asked for there? Latency budgets on UNets of real size, random weights.

    python benchmarks/faster.py sd15
    python benchmarks/faster.py sd15 --dtype bfloat16
    python benchmarks/faster.py sdxl

Every layer is timed at several widths on this machine; all layers then keep the same share of
their width (random weights have no errors to weigh), as much as the time allows. Dense and slim
are timed once more in turn at the end, apart from the search.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import slimdiff
from measuring import write
from shapes import SHAPES, Shape, build, inputs
from slimdiff import costs
from slimdiff.bundles import Allocation
from slimdiff.config import RECIPES
from slimdiff.fitting import fit_speedup, timed
from slimdiff.planning import least_nanoseconds, make_plan
from slimdiff.profiling import narrowed, profile
from slimdiff.shapes import slim_config
from slimdiff.statistics import Probes, Statistics

WANTED = (1.5, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None)
    parser.add_argument("--multiple", type=int, default=8)
    parser.add_argument("--latents", type=int, default=None)
    options = parser.parse_args()
    shape = SHAPES[options.model]
    dtype = getattr(torch, options.dtype) if options.dtype else shape.dtype
    shape = Shape(shape.config, dtype, options.latents or shape.latents)
    unet = build(shape).to(memory_format=torch.channels_last)
    call, settings = inputs(shape, 0), Allocation("uniform", multiple=options.multiple)
    groups, recipe = slimdiff.groups_of(unet), RECIPES["slimdiff"]
    start = time.perf_counter()
    times = profile(unet, groups, call, multiple=options.multiple)
    seconds = round(time.perf_counter() - start, 1)
    print(f"profile: {seconds} s, dense call {times.seconds:.2f} s", flush=True)
    dense = costs.measure(unet, groups, call)

    def plan(wanted: float, limit: int) -> slimdiff.Plan:
        budget, nothing = slimdiff.Budget(speedup=wanted), Statistics("", Probes(1))
        parts = (groups, dense, {}, nothing, budget, recipe, settings)
        return make_plan(type(unet).__name__, *parts, profile=times, limit=limit)

    def measured(wanted: float) -> dict[str, Any]:
        least = least_nanoseconds(groups, recipe, settings, times)
        found = fit_speedup(
            lambda limit: plan(wanted, limit),
            lambda made: timed(unet, groups, made, call),
            times.dense_nanoseconds,
            least,
            wanted,
        )
        again = timed(unet, groups, found, call)
        slim = narrowed(unet, slim_config(unet, groups, found.entries))
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
        }

    rows = []
    for wanted in WANTED:
        try:
            rows.append(measured(wanted))
        except slimdiff.SlimdiffError as error:
            rows.append({"wanted": wanted, "unavailable": str(error)})
        print(rows[-1], flush=True)
    name = str(shape.dtype).removeprefix("torch.")
    write(
        f"faster-{options.model}-{name}",
        {
            "model": options.model,
            "dtype": name,
            "latents": shape.latents,
            "params": dense.params,
            "macs": dense.macs,
            "multiple": options.multiple,
            "profile_seconds": seconds,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
