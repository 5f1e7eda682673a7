"""slimdiff on a trained transformer, the bundled `scenes-dit`, on held-out test prompts, in one go.

    python benchmarks/transformer.py               # goes on where it was stopped
    python benchmarks/transformer.py --reference scenes-dit-qknorm

Every row removes the same share of the transformer's parameters. Recipes work from one calibration;
calibration and test prompts are disjoint, and the reference was trained on neither.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import slimdiff
from measuring import Rows, peak_of
from slimdiff import costs
from slimdiff.reference.captions import prompts
from slimdiff.widths import measure_curves
from trial import BATCH, Size, Trial

SIZE = Size(images=64, errors=16, runs=3)
MANY, CALIBRATION = 512, 128
"""Test prompts of the dense row and of the headline, whose accuracies are compared to a point."""

SHARES, HEADLINE = (0.2, 0.3, 0.4), 0.3
PLAIN = ("attention", "feed_forward")
METHODS: dict[str, tuple[str, str, tuple[str, ...] | None]] = {
    "slimdiff, probed": ("slimdiff", "probed", None),
    "slimdiff, probed, modulations stay": ("slimdiff", "probed", PLAIN),
    "slimdiff, uniform": ("slimdiff", "uniform", None),
    "paper, entropic": ("paper", "entropic", PLAIN),
    "magnitude, threshold": ("magnitude", "threshold", PLAIN),
}


class Bench:
    """The trial, one calibration, and the rows."""

    def __init__(self, reference: str, work: Path) -> None:
        self.trial = Trial(SIZE, reference)
        self.dense = self.trial.dense
        config = slimdiff.CalibrationConfig(batch_size=BATCH, **self.trial.sampling)
        self.statistics = slimdiff.calibrate(
            self.trial.pipe,
            prompts("calibration", CALIBRATION),
            config,
            checkpoint=work / reference,
        )
        settings = {"reference": reference, "calibration_prompts": CALIBRATION, "many": MANY}
        self.rows = Rows(
            f"transformer-{reference}", settings | vars(SIZE) | {"sampling": self.trial.sampling}
        )
        self._curves: dict[Any, Any] = {}

    def curves(self, recipe: str, allocation: str, layers: tuple[str, ...] | None) -> Any:
        """Error curves, and the seconds and MiB that they took."""
        key = (recipe, allocation == "probed", layers)
        if key not in self._curves:
            args = (self.dense, self.statistics, recipe, allocation)
            self._curves[key] = peak_of(lambda: measure_curves(*args, layers=layers))
        return self._curves[key]

    def slim(self, method: str, share: float) -> dict[str, Any]:
        """A row: the method at a share of the parameters removed, or why there is none."""
        recipe, allocation, layers = METHODS[method]
        labels = {"method": method, "removed": share}
        curves, seconds, peak = self.curves(recipe, allocation, layers)
        budget = slimdiff.Budget(params=1 - share)
        how: dict[str, Any] = {"recipe": recipe, "allocation": allocation, "layers": layers}

        def make() -> Any:
            plan = slimdiff.allocate(self.dense, self.statistics, budget, curves=curves, **how)
            copy = self.trial.copy_of_denoiser()
            return slimdiff.rewrite(copy, self.statistics, plan, curves=curves)

        try:
            denoiser, more, top = peak_of(make)
        except slimdiff.SlimdiffError as error:
            return labels | {"unavailable": str(error)}
        took = {"seconds": round(seconds + more, 1), "peak_mib": max(peak, top)}
        count = MANY if share == HEADLINE and method == next(iter(METHODS)) else SIZE.images
        return labels | took | self.measured(denoiser, count)

    def measured(self, denoiser: Any, count: int) -> dict[str, Any]:
        """What a denoiser costs and loses, on `count` images."""
        trial = self.trial
        error = trial.velocity_error(denoiser.eval())
        kinds: dict[str, int] = {}
        for group in slimdiff.groups_of(self.dense):
            for path in group.paths.values():
                layer = denoiser.get_submodule(path)
                kinds[group.kind] = kinds.get(group.kind, 0) + costs.parameters(layer)
        return {
            "params": costs.parameters(denoiser),
            "params_by_kind": kinds,
            "macs": trial.macs(denoiser),
            "velocity_error": error.relative,
            "by_timestep": error.by_timestep,
            **trial.quality(trial.with_denoiser(denoiser), count),
            "call_speedup": trial.call_speedup(denoiser, 16),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", default="scenes-dit")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    options = parser.parse_args()
    bench = Bench(options.reference, options.work)
    dense = {"method": "dense", "removed": 0.0}
    bench.rows.measure("dense", lambda: dense | bench.measured(bench.dense, MANY))
    for share in sorted(SHARES, key=lambda share: share != HEADLINE):
        for method in METHODS:
            name = f"{share:.0%} {method}"
            if options.only in name:
                bench.rows.measure(name, lambda m=method, s=share: bench.slim(m, s))


if __name__ == "__main__":
    main()
