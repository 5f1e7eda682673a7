"""Like blocks that share widths: error, sets of widths and graphs, beside widths of their own.

    python benchmarks/block_kinds.py        # a quarter of an hour

Graphs are those that dynamo makes of the repeated blocks in one call, with `fullgraph=True`.
"""

from __future__ import annotations

import copy
import functools
import time
from typing import Any

import torch

import slimdiff
from measuring import Rows
from slimdiff.block_kinds import distinct
from slimdiff.denoiser import denoiser_of
from slimdiff.held_out import HeldOut
from slimdiff.reference.bundled import load_reference
from slimdiff.reference.references import reference, sampling_of
from slimdiff.widths import measure_curves

MODELS = ("scenes-dit", "emoji-unet")
PROMPTS, BATCH = 64, 16
MACS, KINDS = (0.65, 0.5), (None, 4, 2, 1)


def main() -> None:
    rows = Rows("block-kinds", {"prompts": PROMPTS})
    for name in MODELS:
        pipe = load_reference(name, torch.float32)
        config = slimdiff.CalibrationConfig(batch_size=BATCH, **sampling_of(name))
        texts = reference(name).world.prompts("calibration", PROMPTS)
        statistics = slimdiff.calibrate(pipe, texts, config)
        dense = denoiser_of(pipe)[1]
        curves = measure_curves(dense, statistics)
        for macs in MACS:
            for kinds in KINDS:
                make = functools.partial(row, dense, statistics, curves, macs, kinds)
                told = "of their own" if kinds is None else f"{kinds} sets at most"
                rows.measure(f"{name}, {macs:.0%} of the MACs, widths {told}", make)


def row(
    dense: Any, statistics: slimdiff.Statistics, curves: Any, macs: float, kinds: int | None
) -> dict[str, Any]:
    """What a plan loses on held-out prompts, and how many graphs its blocks make."""
    budget = slimdiff.Budget(macs=macs)
    plan = slimdiff.allocate(dense, statistics, budget, curves=curves, block_kinds=kinds)
    sets = distinct(dense, slimdiff.groups_of(dense), plan)
    slim = copy.deepcopy(dense)
    held_out = HeldOut(slim, statistics)
    slimdiff.rewrite(slim, statistics, plan, curves=curves)
    figures = held_out.figures()
    graphs, seconds = compiled(slim, statistics.probes.batches(2)[0])
    return {
        "velocity_error": figures["error_on_probes"],
        "guided": figures.get("error_guided"),
        "macs": plan.figures["macs"] / plan.figures["macs_dense"],
        "sets_of_widths": sets,
        "graphs": graphs,
        "seconds": round(seconds, 1),
    }


def compiled(slim: Any, call: dict[str, Any]) -> tuple[int, float]:
    """Graphs of the repeated blocks, and seconds of tracing them and the first call."""
    torch._dynamo.reset()
    graphs = 0

    def count(module: Any, _inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    start = time.perf_counter()
    slim.compile_repeated_blocks(fullgraph=True, backend=count)
    with torch.no_grad():
        slim(**call)
    return graphs, time.perf_counter() - start


if __name__ == "__main__":
    main()
