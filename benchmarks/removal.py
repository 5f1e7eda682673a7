"""What removing whole layers and heads buys, and what spreading the probes over the timesteps does.

    python benchmarks/removal.py            # goes on where it was stopped

Plans for the bundled UNet under several budgets: with layers that may only narrow, with layers that
may go wholly, with heads that may go too, from draws of sixteen probes out of the same calls; and
the same with probes drawn at random, as they once were. The figure is the velocity error on test
prompts; `--split selection` takes those that anything may be tuned on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import slimdiff
from measuring import RESULTS, Rows
from slimdiff.bundles import Allocation
from slimdiff.config import RECIPES
from slimdiff.jobs import Job
from slimdiff.probes import Probes
from slimdiff.reference.captions import prompts
from slimdiff.widths import measure_curves
from trial import BATCH, SAMPLING, Size, Trial

SHARES = (0.65, 0.5, 0.4)
DRAWS = 1  # a row takes minutes; more draws go on in the same file
CALIBRATION, POOL = 64, 16
SIZE = Size(images=32, errors=32, runs=1)
VARIANTS = ("narrowed", "removing", "removing heads too")


class RandomProbes(Probes):
    """Probes drawn from all rows alike, whatever their timestep."""

    def _first(self, times: Mapping[str, float | None]) -> list[str]:
        return sorted(times)[: self.capacity]


class Removal:
    """The trial, statistics of one calibration, and the calls that probes are drawn from."""

    def __init__(self, work: Path, results: Path, split: str) -> None:
        self.trial = Trial(SIZE, split=split)
        self.unet = self.trial.pipe.unet
        config = slimdiff.CalibrationConfig(batch_size=BATCH, **SAMPLING)
        texts = prompts("calibration", CALIBRATION)
        folder = work / "removal"
        self.statistics = slimdiff.calibrate(self.trial.pipe, texts, config, checkpoint=folder)
        pool = Trial(replace(SIZE, errors=POOL), split="calibration")
        self.pool = [call for call, _ in pool.calls]
        settings = {
            "shares": SHARES,
            "calibration_prompts": CALIBRATION,
            "probes_from_prompts": POOL,
            "error_prompts": SIZE.errors,
            "images": SIZE.images,
            "sampling": SAMPLING,
        } | ({} if split == "test" else {"split": split})
        self.rows = Rows("removal", settings, results)

    @cache  # noqa: B019  (one object, which lives as long as the process)
    def job(self, draw: int, spread: bool, share: float) -> Job:
        """What is needed to make plans from one draw of probes."""
        statistics, curves = self.drawn(draw, spread)
        budget = slimdiff.Budget(params=share)
        settings = Allocation("probed")
        return Job(self.unet, statistics, budget, RECIPES["slimdiff"], settings, None, curves)

    @cache  # noqa: B019  (one object, which lives as long as the process)
    def drawn(self, draw: int, spread: bool) -> tuple[slimdiff.Statistics, Any]:
        """The statistics with one draw of probes, and their curves."""
        probes = (Probes if spread else RandomProbes)(16, draw)
        for call in self.pool:
            probes.offer(call)
        statistics = replace(self.statistics, probes=probes)
        return statistics, measure_curves(self.unet, statistics)

    def row(self, draw: int, spread: bool, share: float, variant: str) -> dict[str, Any]:
        """One plan: what it loses on its probes and on test prompts."""
        job = self.job(draw, spread, share)
        heads = variant == VARIANTS[2]
        plan = (job if variant == VARIANTS[0] else job.removing(heads=heads)).plan()
        gone = plan.removed(job.groups)
        slim = slimdiff.rewrite(
            self.trial.copy_of_denoiser(), job.statistics, plan, curves=job.curves
        )
        quality = self.trial.quality(self.trial.with_denoiser(slim), SIZE.images)
        return {
            "params": plan.figures["params"],
            "macs": plan.figures["macs"],
            "predicted": plan.figures["predicted_error"],
            "on_probes": job.lost(plan),
            "velocity": self.trial.velocity_error(slim).relative,
            "psnr": quality["psnr"],
            "scene_accuracy": quality["scene_accuracy"],
            "removed": sorted({group.layer for group in gone}),
            "layers_removed": len({group.layer for group in gone}),
            "heads_removed": plan.figures.get("heads_removed", 0),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--split", choices=("test", "selection"), default="test")
    asked = parser.parse_args()
    measured = Removal(asked.work, asked.results, asked.split)
    for draw in range(DRAWS):
        for spread, variant in (*((True, variant) for variant in VARIANTS), (False, VARIANTS[0])):
            name = f"{'spread' if spread else 'random'}, {variant}"
            for share in SHARES:
                measured.rows.measure(
                    f"{share} {name} {draw}",
                    lambda: measured.row(draw, spread, share, variant),  # noqa: B023  (called at once)
                )


if __name__ == "__main__":
    main()
