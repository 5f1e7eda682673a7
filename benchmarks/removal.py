"""What removing whole layers buys, and what spreading the probes over the timesteps does.

    python benchmarks/removal.py            # goes on where it was stopped

Plans for the bundled UNet under several budgets, with layers that may only narrow and with layers
that may go wholly, from draws of sixteen probes out of the same calls; and the same with probes
drawn at random, as they once were. The figure is the velocity error on test prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import slimdiff
from measuring import Rows
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


class RandomProbes(Probes):
    """Probes drawn from all rows alike, whatever their timestep."""

    def _first(self, times: Mapping[str, float | None]) -> list[str]:
        return sorted(times)[: self.capacity]


class Removal:
    """The trial, statistics of one calibration, and the calls that probes are drawn from."""

    def __init__(self, work: Path) -> None:
        self.trial = Trial(SIZE)
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
        }
        self.rows = Rows("removal", settings)

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

    def row(self, draw: int, spread: bool, share: float, removing: bool) -> dict[str, Any]:
        """One plan: what it loses on its probes and on test prompts."""
        job = self.job(draw, spread, share)
        plan = (job.removing() if removing else job).plan()
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
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    measured = Removal(parser.parse_args().work)
    for draw in range(DRAWS):
        for spread, removing in ((True, False), (True, True), (False, False)):
            name = f"{'spread' if spread else 'random'}, {'removing' if removing else 'narrowed'}"
            for share in SHARES:
                measured.rows.measure(
                    f"{share} {name} {draw}",
                    lambda: measured.row(draw, spread, share, removing),  # noqa: B023  (called at once)
                )


if __name__ == "__main__":
    main()
