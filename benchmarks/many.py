"""Scene accuracy of dense, slim and faster pipelines on many test prompts, with narrow intervals.

    python benchmarks/many.py --prompts 2048      # goes on where it was stopped
    python benchmarks/many.py --only obs-diff     # rows whose name begins so

Half of the bundled UNet's parameters are removed after calibration on 128 prompts; or as many as
make a call of eight images 1.5 times faster. OBS-Diff's rule removes as many parameters, or MACs.
Each denoiser's call is timed beside the dense one's, in float32.
All pipelines draw under bfloat16 autocast, which is two times faster here; everything else is done
in float32.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import slimdiff
from bench import TIMED_ROWS
from measuring import Rows
from peers import PEERS, Job, at_macs
from peers.job import fuse_upsamplers_, removable
from slimdiff import costs
from slimdiff.evaluate import generate
from slimdiff.reference.captions import prompts
from slimdiff.reference.judge import scene_accuracy
from slimdiff.widths import measure_curves
from trial import BATCH, SAMPLING, Size, Trial

PARAMS, SPEEDUP, CALIBRATION, CHUNK = 0.5, 1.5, 128, 128
LAYERS = ("attention", "feed_forward", "resnet")


class Pipes:
    """The pipelines by name, each made when it is asked for."""

    def __init__(self, work: Path) -> None:
        self.trial, self.work = Trial(Size(images=1, errors=TIMED_ROWS // 2, runs=5)), work / "many"
        self.texts = prompts("calibration", CALIBRATION)
        self.make: dict[str, Callable[[], Any]] = {
            "dense": lambda: self.trial.dense,
            "slim": lambda: self.slim(slimdiff.Budget(params=PARAMS)),
            "faster": lambda: self.faster,
            "obs-diff": self.peer,
            "obs-diff-faster": self.peer_as_fast,
        }

    def pipe(self, name: str) -> Any:
        """A pipeline with the denoiser of that name."""
        unet = self.make[name]()
        return self.trial.with_denoiser(unet.eval().to(memory_format=torch.channels_last))

    def statistics(self, weights: str = "uniform") -> slimdiff.Statistics:
        """Statistics of the calibration prompts, kept in the work folder."""
        own: Any = {"timestep_weights": weights}
        config = slimdiff.CalibrationConfig(batch_size=BATCH, **own, **SAMPLING)
        pipe, folder = self.trial.pipe, self.work / weights
        return slimdiff.calibrate(pipe, self.texts, config, checkpoint=folder)

    @functools.cached_property
    def faster(self) -> Any:
        """slimdiff's denoiser of the time that was asked for."""
        return self.slim(slimdiff.Budget(speedup=SPEEDUP))

    def slim(self, budget: slimdiff.Budget) -> Any:
        """slimdiff's denoiser."""
        statistics = self.statistics()
        curves = measure_curves(self.trial.dense, statistics, folder=self.work)
        how: dict[str, Any] = {"curves": curves, "timed_rows": TIMED_ROWS}
        plan = slimdiff.allocate(self.trial.dense, statistics, budget, **how)
        print(plan.budget, plan.figures, flush=True)
        return slimdiff.rewrite(self.trial.copy_of_denoiser(), statistics, plan, curves=curves)

    def peer(self, remove: int | None = None) -> Any:
        """OBS-Diff's denoiser; by default it loses as many parameters as slimdiff's."""
        if remove is None:
            remove = int((1 - PARAMS) * costs.parameters(self.trial.dense))
        given = (self.trial.pipe, self.statistics(), self.statistics("log"), self.texts, SAMPLING)
        return PEERS["obs-diff"].slim(Job(*given, remove, LAYERS))

    def peer_as_fast(self) -> Any:
        """OBS-Diff's denoiser of no more MACs than the faster one of slimdiff, fused as that is."""

        def make(remove: int) -> dict[str, Any]:
            unet = self.peer(remove)
            fuse_upsamplers_(unet)
            return {"unet": unet}

        found = at_macs(
            make,
            lambda made: self.trial.macs(made["unet"]),
            self.trial.macs(self.faster),
            removable(self.trial.dense, LAYERS),
        )
        return found["unet"]


def cost(trial: Trial, unet: Any) -> dict[str, Any]:
    """What a denoiser holds, and how long it takes beside the dense one."""
    return {
        "params": costs.parameters(unet),
        "macs": trial.macs(unet),
        "call_speedup": trial.call_speedup(unet, TIMED_ROWS),
    }


def chunk(pipe: Any, start: int, stop: int) -> dict[str, Any]:
    """How many of some prompts' scenes are right."""
    texts = prompts("test", stop)[start:]
    with torch.autocast("cpu", torch.bfloat16):
        images = generate(pipe, texts, range(start, stop), batch_size=32, **SAMPLING)
    found = scene_accuracy(images, texts)
    right = round(found.whole * len(texts))
    return {"right": right, "of": len(texts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--only", default="", help="rows whose name begins with this")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    options = parser.parse_args()
    pipes = Pipes(options.work)
    settings = {"params": PARAMS, "calibration_prompts": CALIBRATION, "sampling": SAMPLING}
    rows = Rows("many", settings | {"autocast": "bfloat16"})
    for name in pipes.make:
        starts = range(0, options.prompts, CHUNK)
        spans = [(start, min(start + CHUNK, options.prompts)) for start in starts]
        missing = [span for span in spans if f"{name} {span[0]} to {span[1]}" not in rows.rows]
        if f"{name} denoiser" in rows.rows and not missing:
            continue
        if not f"{name} ".startswith(options.only):
            continue
        pipe = pipes.pipe(name)
        rows.measure(f"{name} denoiser", lambda p=pipe: cost(pipes.trial, p.unet))
        for a, b in missing:
            rows.measure(f"{name} {a} to {b}", lambda p=pipe, a=a, b=b: chunk(p, a, b))


if __name__ == "__main__":
    main()
