"""What might still help after the allocation: refinements against none, at equal size, in one run.

    python benchmarks/refinements.py       # goes on where it was stopped

The figure is the velocity error along the dense trajectory of held-out selection prompts. Whatever
a refinement chooses, it chooses on the probes and on calibration prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import slimdiff
from measuring import Rows
from refitting import residuals
from slimdiff import bundles as bundles_
from slimdiff import costs
from slimdiff.bundles import Allocation, Bundle, bundles_of
from slimdiff.config import RECIPES
from slimdiff.curves import effective_weights, probes_of
from slimdiff.evaluate import generate
from slimdiff.plan import Plan
from slimdiff.planning import counted
from slimdiff.recipes import decompose_group
from slimdiff.reference.captions import prompts
from slimdiff.widths import measure_curves
from trial import BATCH, Size, Trial

SHARES, CALIBRATION, ERRORS = (0.35, 0.50, 0.60), 64, 24
PAIRS, NEAREST = 40, 12
"""Exchanges that are tried, and among how many bundles at either end they are looked for."""

REFIT_PROMPTS, RIDGES = 32, (1e-2, 1e-1, 1.0)
RECIPE = RECIPES["slimdiff"]


class Refinements:
    """The trial on selection prompts, one calibration, its curves, and the rows."""

    def __init__(self, work: Path) -> None:
        self.work = work / "refinements"
        self.trial = Trial(Size(images=0, errors=ERRORS, runs=1), split="selection")
        self.dense = self.trial.dense
        self.statistics = self.calibrated(self.trial.pipe, "base")
        self.curves = measure_curves(self.dense, self.statistics, "slimdiff", "probed")
        self.groups = {group.name: group for group in slimdiff.groups_of(self.dense)}
        self.counted = costs.measure(self.dense, list(self.groups.values()), self.trial.one_row)
        self.bundles = bundles_of(list(self.groups.values()), RECIPE, Allocation("probed"))
        self.probes = probes_of(self.dense, self.statistics)
        self._swapped: dict[tuple[str, int], dict[str, Tensor]] = {}

    def calibrated(self, pipe: Any, name: str) -> slimdiff.Statistics:
        """Statistics of the calibration prompts, kept under a name."""
        config = slimdiff.CalibrationConfig(batch_size=BATCH, **self.trial.sampling)
        texts = prompts("calibration", CALIBRATION)
        return slimdiff.calibrate(pipe, texts, config, checkpoint=self.work / name)

    def plan(self, share: float, curves: Any = None) -> Plan:
        """The plan as it is, under these curves or the measured ones."""
        budget = slimdiff.Budget(params=1 - share)
        how: dict[str, Any] = {"curves": curves or self.curves}
        return slimdiff.allocate(self.dense, self.statistics, budget, remove_layers=False, **how)

    def slim(self, plan: Plan) -> Any:
        """A slim denoiser."""
        copy = self.trial.copy_of_denoiser()
        return slimdiff.rewrite(copy, self.statistics, plan, curves=self.curves)

    def lost(self, widths: dict[str, int]) -> float:
        """Error on the probes with groups at these widths, all together."""
        weights: dict[str, Tensor] = {}
        for name, width in widths.items():
            weights |= self._weights(name, width)
        return self.probes.error(weights)

    def _weights(self, name: str, width: int) -> dict[str, Tensor]:
        group = self.groups[name]
        if width == group.width:
            return {}
        if (name, width) not in self._swapped:
            ordered = self.curves[name].ordered
            found = decompose_group(self.dense, group, self.statistics, RECIPE, ordered)
            maps = found.maps(width)
            self._swapped[name, width] = effective_weights(self.dense, group, maps)
        return self._swapped[name, width]

    def in_context(self, share: float) -> Any:
        """Gains of the groups beside one another: what each bundle's restoration spares."""
        plan = self.plan(share)
        widths = {name: entry.width for name, entry in plan.entries.items()}
        whole, curves = self.lost(widths), dict(self.curves)
        for bundle in self.bundles:
            names = [group.name for group in bundle.groups]
            predicted = sum(self.curves[name].at(widths[name]) for name in names)
            if predicted < 1e-3 * whole:
                continue
            spared = whole - self.lost(
                {name: width for name, width in widths.items() if name not in names}
            )
            factor = min(max(spared / predicted, 0.25), 4.0)
            for name in names:
                gains = self.curves[name].gains or {}
                scaled = {width: gain * factor for width, gain in gains.items()}
                curves[name] = replace(self.curves[name], gains=scaled)
        return self.slim(self.plan(share, curves))

    def exchanged(self, share: float) -> Any:
        """Width moves from a bundle to another as long as the error on the probes falls."""
        plan = self.plan(share)
        limit = int((1 - share) * self.counted.params)
        entries, best = dict(plan.entries), self.lost(_widths(plan.entries))
        tried: set[tuple[int, int]] = set()
        for _ in range(PAIRS):
            pair = next(self._pairs(entries, tried), None)
            if pair is None:
                break
            tried.add(pair)
            changed = self._moved(entries, *pair)
            if counted(list(self.groups.values()), self.counted, changed, [])["params"] > limit:
                continue
            error = self.lost(_widths(changed))
            if error < 0.995 * best:
                entries, best = changed, error
                tried.clear()
        return self.slim(replace(plan, entries=entries))

    def _pairs(self, entries: Any, tried: set[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Narrower where little is predicted to be lost, wider where much is won, best first."""
        down = sorted(range(len(self.bundles)), key=lambda i: self._change(entries, i, -1))
        up = sorted(range(len(self.bundles)), key=lambda i: self._change(entries, i, 1))
        pairs = [(i, j) for i in down[:NEAREST] for j in up[:NEAREST] if i != j]
        order = sorted(
            pairs, key=lambda ij: self._change(entries, ij[0], -1) + self._change(entries, ij[1], 1)
        )
        return (pair for pair in order if pair not in tried)

    def _change(self, entries: Any, index: int, step: int) -> float:
        """Predicted change of the error of a bundle that takes a step; none possible: infinite."""
        bundle, size = self.bundles[index], self._stepped(entries, index, step)
        if size is None:
            return float("inf")
        return sum(
            self.curves[group.name].of(bundle.entry(group, size))
            - self.curves[group.name].of(entries[group.name])
            for group in bundle.groups
        )

    def _stepped(self, entries: Any, index: int, step: int) -> bundles_.Size | None:
        bundle: Bundle = self.bundles[index]
        sizes = sorted(bundle.sizes)
        entry = entries[bundle.groups[0].name]
        place = sizes.index(bundles_.Size(entry.width, entry.heads)) + step
        return sizes[place] if 0 <= place < len(sizes) else None

    def _moved(self, entries: Any, down: int, up: int) -> Any:
        changed = dict(entries)
        for index, step in ((down, -1), (up, 1)):
            size = self._stepped(entries, index, step)
            assert size is not None
            for group in self.bundles[index].groups:
                changed[group.name] = self.bundles[index].entry(group, size)
        return changed

    def recalibrated(self, share: float) -> Any:
        """Half of the removal, statistics of what came out, then the other half from there."""
        halfway = self.slim(self.plan(share / 2))
        pipe = self.trial.with_denoiser(halfway)
        statistics = self.calibrated(pipe, f"halfway-{share}")
        budget = slimdiff.Budget(params=(1 - share) / (1 - share / 2))
        plan = slimdiff.allocate(halfway, statistics, budget)
        return slimdiff.rewrite(halfway, statistics, plan)

    def refit(self, share: float, ridge: float) -> Any:
        """Output linears solved again on the slim model's inputs for the dense model's outputs,
        drawn towards what they are by a ridge of this share of the mean diagonal."""
        slim = self.slim(self.plan(share))
        texts = prompts("calibration", REFIT_PROMPTS)
        options: dict[str, Any] = {"batch_size": BATCH, "output_type": "latent"}
        seeds = range(1000, 1000 + len(texts))

        def sample() -> None:
            generate(self.trial.pipe, texts, seeds, **options, **self.trial.sampling)

        paths = [
            group.paths[role]
            for group in self.groups.values()
            for role in ("out", "down")
            if role in group.paths
        ]
        for name, (xx_ii, xr_io) in residuals(self.dense, slim, paths, sample).items():
            layer = slim.get_submodule(name)
            eye = torch.eye(len(xx_ii), dtype=xx_ii.dtype)
            damped = xx_ii + ridge * xx_ii.diagonal().mean() * eye
            layer.weight.data += torch.linalg.solve(damped, xr_io).mT.to(layer.weight.dtype)
        return slim

    def variants(self) -> dict[str, Callable[[float], Any]]:
        """A slim denoiser at a share removed, by refinement."""
        return {
            "none": lambda share: self.slim(self.plan(share)),
            "gains beside one another, allocated again": self.in_context,
            "widths exchanged between pairs": self.exchanged,
            "recalibrated halfway": self.recalibrated,
        } | {
            f"output linears refit in place, ridge {ridge:g}": (
                lambda share, ridge=ridge: self.refit(share, ridge)
            )
            for ridge in RIDGES
        }


def _widths(entries: Any) -> dict[str, int]:
    return {name: entry.width for name, entry in entries.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    options = parser.parse_args()
    settings = {
        "shares": SHARES,
        "calibration_prompts": CALIBRATION,
        "error_prompts": ERRORS,
        "split": "selection",
    }
    rows, bench = Rows("refinements", settings), Refinements(options.work)

    def measured(make: Callable[[float], Any], share: float) -> dict[str, Any]:
        slim = make(share)
        error = bench.trial.velocity_error(slim).relative
        return {"share": share, "params": costs.parameters(slim), "velocity_error": error}

    for share in SHARES:
        for name, make in bench.variants().items():
            if options.only in name:
                rows.measure(f"{share:.0%} {name}", lambda m=make, s=share: measured(m, s))


if __name__ == "__main__":
    main()
