"""What the rows of the evidence share: the trial, one calibration, and how each row is measured."""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch

import slimdiff
from measuring import RESULTS, Rows, peak_of
from peers import PEERS, Job, at_macs, deepcache, weight_bytes
from peers.job import fuse_upsamplers_, removable, seconds_spared
from slimdiff import costs
from slimdiff.config import TRANSFORMER
from slimdiff.denoiser import denoiser_of
from slimdiff.widths import measure_curves
from trial import BATCH, Size, Trial

FULL, QUICK = Size(images=48, errors=16, runs=5), Size(images=16, errors=8, runs=1)
PROMPTS = 256
MANY = 512
"""Test prompts of the dense row and of the headline, whose accuracies are compared to a point."""

SHARES = (0.20, 0.41, 0.60, 0.75)
PRINTED = ("error_on_probes", "error_interval", "error_guided", "error_on_seen", "refit")
"""Figures of a plan that are compared with what the trial measures."""

TIMED_ROWS = 16
"""Rows of a call whose speed is asked for, eight images with guidance: of two rows so small a model
spends much of its time between the layers."""


class Bench:
    """The trial, the statistics that all rows share, and the rows."""

    def __init__(
        self,
        options: argparse.Namespace,
        name: str = "scenes-unet",
        size: Size = FULL,
        many: int = MANY,
    ) -> None:
        self.quick = options.quick
        self.size = QUICK if options.quick else size
        self.many = self.size.images if options.quick else max(many, self.size.images)
        self.shares = (0.41,) if options.quick else SHARES
        self.trial = Trial(self.size, name)
        self.pipe, self.sampling = self.trial.pipe, self.trial.sampling
        self.texts = self.trial.world.prompts("calibration", 16 if options.quick else PROMPTS)
        settings = {
            "quick": options.quick,
            "calibration_prompts": len(self.texts),
            "sampling": self.sampling,
            **vars(self.size),
            "many": self.many,
        }
        self.work = options.work / name / ("quick" if options.quick else "full")
        results = "evidence" if name == "scenes-unet" else f"evidence-{name}"
        self.rows = Rows(results, settings, self.work if options.quick else RESULTS)
        (self.statistics, seconds, _) = peak_of(lambda: self.calibrated("uniform"))
        print(f"calibration on {len(self.texts)} prompts: {seconds} s (0 if it was kept)")
        self.removable = removable(self.pipe.unet)
        self._curves: dict[Any, tuple[Any, float, float]] = {}

    @functools.cached_property
    def log_statistics(self) -> slimdiff.Statistics:
        """Early steps weigh more, as one of the peers has it."""
        return self.calibrated("log")

    def calibrated(self, weights: str) -> slimdiff.Statistics:
        """Statistics of the calibration prompts, kept in the work folder."""
        folder, config = self.work / weights, self._config(weights)
        return slimdiff.calibrate(self.pipe, self.texts, config, checkpoint=folder)

    def _config(self, weights: str) -> slimdiff.CalibrationConfig:
        return slimdiff.CalibrationConfig(
            batch_size=BATCH,
            timestep_weights=weights,  # type: ignore[arg-type]  # one of the two
            **self.sampling,
        )

    def curves(
        self, recipe: str, allocation: str, layers: tuple[str, ...] | None
    ) -> tuple[Any, float, float]:
        """Error curves, and the seconds and MiB that they took."""
        key = (recipe, "probed" if allocation == "probed" else "", layers)
        if key not in self._curves:
            self._curves[key] = peak_of(
                lambda: measure_curves(
                    self.pipe.unet, self.statistics, recipe, allocation, layers=layers
                )
            )
        return self._curves[key]

    def recipe(
        self,
        recipe: str,
        allocation: str,
        budget: slimdiff.Budget,
        layers: tuple[str, ...] | None = TRANSFORMER,
    ) -> dict[str, Any]:
        """A slim denoiser by one of slimdiff's recipes, and what it took to make."""
        allocation, _, temperature = allocation.partition(" ")
        curves, seconds, peak = self.curves(recipe, allocation, layers)
        how: dict[str, Any] = {"recipe": recipe, "allocation": allocation, "curves": curves}
        how |= {"layers": layers, "timed_rows": TIMED_ROWS}
        how |= {"temperature": float(temperature)} if temperature else {}

        def make() -> Any:
            plan = slimdiff.allocate(self.pipe.unet, self.statistics, budget, **how)
            unet = self.trial.copy_of_denoiser()
            return slimdiff.rewrite(unet, self.statistics, plan, curves=curves)

        unet, more, top = peak_of(make)
        return {"unet": unet, "seconds": round(seconds + more, 1), "peak_mib": max(peak, top)}

    def compressed(self, budget: slimdiff.Budget, **options: Any) -> dict[str, Any]:
        """A slim denoiser as `slimdiff.compress` makes it, from the statistics that are kept.

        Its seconds are those without the calibration.
        """
        pipe = self.trial.with_denoiser(self.trial.copy_of_denoiser())
        config = self._config("uniform")
        kept: dict[str, Any] = {"config": config, "checkpoint": self.work / "uniform"}

        def make() -> Any:
            plan = slimdiff.compress(pipe, self.texts, budget, **kept, **options)
            return plan.figures

        figures, _, peak = peak_of(make)
        seconds = sum(own for stage, own in figures["seconds"].items() if stage != "calibrate")
        printed = {name: figures[name] for name in PRINTED if name in figures}
        unet = denoiser_of(pipe)[1]
        return {"unet": unet, "seconds": round(seconds, 1), "peak_mib": peak, "printed": printed}

    def peer(self, name: str, remove: int, layers: tuple[str, ...] = TRANSFORMER) -> dict[str, Any]:
        """A slim denoiser by a peer, and what it took to make, as if nothing had been kept."""
        job = Job(
            pipe=self.pipe,
            statistics=self.statistics,
            log_statistics=self.log_statistics,
            prompts=self.texts,
            sampling=self.sampling,
            remove=remove,
            layers=layers,
        )
        before = seconds_spared(self.pipe.unet)
        unet, seconds, peak = peak_of(lambda: PEERS[name].slim(job))
        seconds += seconds_spared(self.pipe.unet) - before
        return {"unet": unet, "seconds": round(seconds, 1), "peak_mib": peak}

    def peer_at_macs(
        self,
        name: str,
        share: float,
        layers: tuple[str, ...] = TRANSFORMER,
        *,
        fused: bool = False,
    ) -> dict[str, Any]:
        """A peer that removes as little as leaves at most this share of the MACs.

        With `fused` its upsamplers are fused, as slimdiff's are under such a budget.
        """
        target = share * self.trial.macs(self.pipe.unet)

        def make(remove: int) -> dict[str, Any]:
            made = self.peer(name, remove, layers)
            if fused:
                fuse_upsamplers_(made["unet"])
            return made

        return at_macs(
            make,
            lambda made: self.trial.macs(made["unet"]),
            target,
            removable(self.pipe.unet, layers),
        )

    def macs_of_row(self, name: str) -> float:
        """The share of MACs that the denoiser of a measured row keeps.

        Raises:
            SlimdiffError: there is no such denoiser.
        """
        row = self.rows.rows[name]
        if "macs" not in row:
            raise slimdiff.SlimdiffError(f"{name}: {row['unavailable']}")
        return row["macs"] / self.trial.macs(self.pipe.unet)

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
            "batch_speedup": self.trial.call_speedup(unet, TIMED_ROWS),
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
            "peak_mib": made["peak_mib"],
            **({"printed": made["printed"]} if "printed" in made else {}),
        }
