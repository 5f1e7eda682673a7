"""Time and peak memory of every stage on models of real size, with random weights.

    python benchmarks/scale.py sd15 --params 0.884

Each model goes through inspect, record on two forwards, allocate, rewrite and one forward.
"""

from __future__ import annotations

import argparse

import torch

import slimdiff
from measuring import Stages, write
from shapes import SHAPES, build, inputs
from slimdiff import costs
from slimdiff.widths import measure_curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--params", default="0.884", help="share or count that stays")
    parser.add_argument("--recipe", default="slimdiff")
    parser.add_argument("--allocation", default=None)
    parser.add_argument("--probes", type=int, default=2)
    parser.add_argument("--dtype", default="float64", help="of the statistics' sums")
    options = parser.parse_args()
    shape, stages = SHAPES[options.model], Stages()
    with stages.stage("build"):
        denoiser = build(shape)
    stages.model_is_built()
    with stages.stage("inspect"):
        groups = slimdiff.groups_of(denoiser)
        native = costs.measure(denoiser, groups, costs.example_inputs(denoiser))
    calls = [inputs(shape, seed) for seed in range(2)]
    dtype = getattr(torch, options.dtype)
    with torch.no_grad(), stages.stage("dense call"):
        dense = denoiser(**calls[0]).sample
    with (
        stages.stage("record"),
        slimdiff.record(denoiser, num_probes=options.probes, dtype=dtype) as statistics,
    ):
        for call in calls:
            denoiser(**call)
    recipe = {"recipe": options.recipe, "allocation": options.allocation}
    with stages.stage("curves"):
        curves = measure_curves(denoiser, statistics, **recipe)
    with stages.stage("allocate"):
        budget = slimdiff.Budget(params=options.params)
        plan = slimdiff.allocate(denoiser, statistics, budget, curves=curves, **recipe)
    with stages.stage("rewrite"):
        slimdiff.rewrite(denoiser, statistics, plan, curves=curves)
    with torch.no_grad(), stages.stage("slim call"):
        slim = denoiser(**calls[0]).sample
    error = float((slim.double() - dense.double()).square().sum() / dense.double().square().sum())
    write(
        f"scale-{options.model}-{plan.allocation}",
        {
            "model": options.model,
            "dtype": str(shape.dtype),
            "latents": shape.latents,
            "groups": len(groups),
            "native_macs": native.macs,
            "stages": stages.rows,
            "plan": plan.figures,
            "recipe": plan.recipe,
            "allocation": plan.allocation,
            "budget": plan.budget,
            "error_on_a_recorded_call": error,
        },
    )


if __name__ == "__main__":
    main()
