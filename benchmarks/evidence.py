"""slimdiff beside its peers on the bundled pipeline, on held-out test prompts, in one run.

    python benchmarks/evidence.py            # hours; goes on where it was stopped
    python benchmarks/evidence.py --quick    # minutes: 41 % alone, few prompts
    python benchmarks/evidence.py --only "41%"

Every row removes the same number of parameters from attention and feed-forward layers (20, 41, 60
and 75 % of them), or the same share of all MACs; all of them work from one calibration. Calibration
and test prompts are disjoint, and the reference was trained on neither.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import slimdiff
from measuring import Rows, peak_of
from peers import PEERS, Job, deepcache, int8, weight_bytes
from peers.job import removable
from slimdiff import costs
from slimdiff.config import TRANSFORMER
from slimdiff.reference.captions import prompts
from slimdiff.widths import measure_curves
from trial import BATCH, SAMPLING, Size, Trial

SHARES = (0.20, 0.41, 0.60, 0.75)
MACS = (0.8,)
RECIPES = (
    ("slimdiff", "probed"),
    ("paper", "entropic 0.3"),  # the best temperature on selection prompts: see ablations.py
    ("paper", "uniform"),
    ("magnitude", "threshold"),
)
HEADLINE = "41% slimdiff probed"
FULL, QUICK = Size(images=48, errors=16, runs=5), Size(images=16, errors=8, runs=1)
MANY = 512
"""Test prompts of the dense row and of the headline, whose accuracies are compared to a point."""


class Bench:
    """The trial, the statistics that all rows share, and the rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.size = QUICK if options.quick else FULL
        self.many = self.size.images if options.quick else MANY
        self.shares = (0.41,) if options.quick else SHARES
        self.texts = prompts("calibration", 16 if options.quick else 128)
        settings = {
            "quick": options.quick,
            "calibration_prompts": len(self.texts),
            "sampling": SAMPLING,
            **vars(self.size),
            "many": self.many,
        }
        self.trial = Trial(self.size)
        self.pipe = self.trial.pipe
        self.rows = Rows("evidence-quick" if options.quick else "evidence", settings)
        self.work = options.work / ("quick" if options.quick else "full")
        (self.statistics, seconds, _) = peak_of(lambda: self.calibrated("uniform"))
        print(f"calibration on {len(self.texts)} prompts: {seconds} s (0 if it was kept)")
        self.log_statistics = self.calibrated("log")
        self.removable = removable(self.pipe.unet)
        self._curves: dict[tuple[str, str], tuple[Any, float, float]] = {}

    def calibrated(self, weights: str) -> slimdiff.Statistics:
        """Statistics of the calibration prompts, kept in the work folder."""
        config = slimdiff.CalibrationConfig(
            batch_size=BATCH,
            timestep_weights=weights,  # type: ignore[arg-type]  # one of the two
            **SAMPLING,
        )
        return slimdiff.calibrate(self.pipe, self.texts, config, checkpoint=self.work / weights)

    def curves(self, recipe: str, allocation: str) -> tuple[Any, float, float]:
        """Error curves, and the seconds and GiB that they took."""
        key = (recipe, "probed" if allocation == "probed" else "")
        if key not in self._curves:
            self._curves[key] = peak_of(
                lambda: measure_curves(
                    self.pipe.unet, self.statistics, recipe, allocation, layers=TRANSFORMER
                )
            )
        return self._curves[key]

    def recipe(self, recipe: str, allocation: str, budget: slimdiff.Budget) -> dict[str, Any]:
        """A slim denoiser by one of slimdiff's recipes, and what it took to make."""
        allocation, _, temperature = allocation.partition(" ")
        curves, seconds, peak = self.curves(recipe, allocation)
        how: dict[str, Any] = {"recipe": recipe, "allocation": allocation, "curves": curves}
        how["layers"] = TRANSFORMER
        how |= {"temperature": float(temperature)} if temperature else {}

        def make() -> Any:
            plan = slimdiff.allocate(self.pipe.unet, self.statistics, budget, **how)
            unet = self.trial.copy_of_denoiser()
            return slimdiff.rewrite(unet, self.statistics, plan, curves=curves)

        unet, more, top = peak_of(make)
        return {"unet": unet, "seconds": round(seconds + more, 1), "peak_gib": max(peak, top)}

    def peer(self, name: str, remove: int) -> dict[str, Any]:
        """A slim denoiser by a peer, and what it took to make."""
        job = Job(
            pipe=self.pipe,
            statistics=self.statistics,
            log_statistics=self.log_statistics,
            prompts=self.texts,
            sampling=SAMPLING,
            remove=remove,
        )
        unet, seconds, peak = peak_of(lambda: PEERS[name].slim(job))
        return {"unet": unet, "seconds": seconds, "peak_gib": peak}

    def measured(self, made: dict[str, Any], count: int) -> dict[str, Any]:
        """What a denoiser that was made costs and loses, on `count` images."""
        unet = made["unet"].eval().to(memory_format=torch.channels_last)
        pipe = self.trial.with_denoiser(unet)
        error = self.trial.velocity_error(unet)
        return {
            **self._size(unet, made),
            "macs": made["macs"] if "macs" in made else self.trial.macs(unet),
            "velocity_error": error.relative,
            "by_timestep": error.by_timestep,
            **self.trial.quality(pipe, count),
            "call_speedup": self.trial.call_speedup(unet),
            "sampling_speedup": self.trial.sampling_speedup(pipe),
        }

    def cached(self, made: dict[str, Any]) -> dict[str, Any]:
        """The same under DeepCache, which spares whole calls: a single call says nothing."""
        unet = made["unet"].eval().to(memory_format=torch.channels_last)
        pipe = self.trial.with_denoiser(unet)
        with deepcache(pipe):
            found = self.trial.quality(pipe, self.size.images)
            found["sampling_speedup"] = self.trial.sampling_speedup(pipe)
        return self._size(unet, made) | found

    def _size(self, unet: Any, made: dict[str, Any]) -> dict[str, Any]:
        return {
            "params": costs.parameters(unet),
            "bytes": weight_bytes(unet),
            "seconds": made["seconds"],
            "peak_gib": made["peak_gib"],
        }


Make = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One row: its name, what it says of itself, and how the rest is measured."""

    name: str
    labels: dict[str, Any]
    make: Make

    def measured(self) -> dict[str, Any]:
        """The row, or why there is none: some methods cannot reach some sizes."""
        try:
            return self.labels | self.make()
        except slimdiff.SlimdiffError as error:
            return self.labels | {"unavailable": str(error)}


def rows_by_parameters(bench: Bench) -> Iterator[Row]:
    """Every method at every share of attention and feed-forward parameters removed."""
    for share in bench.shares:
        remove = int(share * bench.removable)
        labels = {"group": f"{share:.0%} of attention and feed-forward removed", "removed": share}
        for recipe, allocation in RECIPES:
            name = f"{share:.0%} {recipe} {allocation}"
            count = bench.many if name == HEADLINE else bench.size.images
            own = {"method": f"{recipe}, {allocation}", "origin": "slimdiff"}
            yield Row(
                name,
                labels | own,
                lambda r=recipe, a=allocation, n=remove, c=count: bench.measured(
                    bench.recipe(r, a, slimdiff.Budget(remove=n)), c
                ),
            )
        for peer in (peer for peer in PEERS.values() if peer.structural):
            yield Row(
                f"{share:.0%} {peer.name}",
                labels | {"method": peer.name, "origin": peer.origin},
                lambda p=peer.name, n=remove: bench.measured(bench.peer(p, n), bench.size.images),
            )


def rows_by_macs(bench: Bench) -> Iterator[Row]:
    """slimdiff's recipes at equal MACs."""
    for share in MACS:
        for recipe, allocation in RECIPES:
            labels = {"group": f"{share:.0%} of all MACs left", "origin": "slimdiff"}
            yield Row(
                f"MACs {share:.0%} {recipe} {allocation}",
                labels | {"method": f"{recipe}, {allocation}"},
                lambda r=recipe, a=allocation, s=share: bench.measured(
                    bench.recipe(r, a, slimdiff.Budget(macs=s)), bench.size.images
                ),
            )


def other_rows(bench: Bench) -> Iterator[Row]:
    """Dense, int8 and DeepCache, alone and on top of the headline's slim denoiser."""

    def dense() -> dict[str, Any]:
        return {"unet": bench.trial.copy_of_denoiser(), "seconds": 0.0, "peak_gib": 0.0}

    def slim() -> dict[str, Any]:
        remove = int(0.41 * bench.removable)
        return bench.recipe("slimdiff", "probed", slimdiff.Budget(remove=remove))

    def quantised(made: dict[str, Any]) -> dict[str, Any]:
        macs = bench.trial.macs(made["unet"])
        unet, seconds, peak = peak_of(lambda: int8(made["unet"]))
        taken = {"seconds": round(made["seconds"] + seconds, 1), "peak_gib": peak, "macs": macs}
        return bench.measured({"unet": unet} | taken, bench.size.images)

    labels = {"group": "Dense, and what can be added to it"}
    yield Row(
        "dense",
        labels | {"method": "dense", "removed": 0.0},
        lambda: bench.measured(dense(), bench.many),
    )
    for name, start in (("", dense), ("slimdiff 41 % + ", slim)):
        own = labels | {"method": f"{name}int8", "origin": PEERS["int8"].origin}
        yield Row(f"{name}int8", own, lambda s=start: quantised(s()))
        own = labels | {"method": f"{name}DeepCache", "origin": PEERS["deepcache"].origin}
        yield Row(f"{name}deepcache", own, lambda s=start: bench.cached(s()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few prompts, for a first look")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    parser.add_argument("--backwards", action="store_true", help="last row first: a second process")
    options = parser.parse_args()
    bench = Bench(options)
    rows = [*other_rows(bench), *rows_by_parameters(bench), *rows_by_macs(bench)]
    for row in reversed(rows) if options.backwards else rows:
        if options.only in row.name:
            bench.rows.measure(row.name, row.measured)


if __name__ == "__main__":
    main()
