"""What each choice of the default recipe is worth: one thing changed at a time, in one run.

    python benchmarks/ablations.py           # goes on where it was stopped
    python benchmarks/ablations.py --only prompts

The figure is the velocity error along the dense trajectory of held-out selection prompts (the test
prompts stay unseen by choices), at 41 % and 60 % of attention and feed-forward parameters removed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import slimdiff
from measuring import RESULTS, Rows, command
from peers.job import removable
from slimdiff.config import RECIPES, TRANSFORMER, Recipe
from slimdiff.reference.captions import prompts
from slimdiff.results import made_by, write
from slimdiff.widths import measure_curves
from trial import BATCH, SAMPLING, Size, Trial

SHARES = (0.41, 0.60)
CALIBRATION = 64
BASE = RECIPES["slimdiff"]
RECIPE_CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "keys not centred": {"keys": "whitened"},
    "values: after attention, no joint refit": {"values": "attended"},
    "values: before attention (paper)": {"values": "whitened"},
    "units: ridge leverage (paper)": {"units": "leverage"},
    "units: activation magnitude": {"units": "magnitude"},
    "units: elimination, no refit": {"refit": False},
}
ALLOCATIONS: dict[str, dict[str, Any]] = {
    "widths: untied": {"tied": False},
    "widths: any, not multiples of 8": {"multiple": 1},
    "widths: multiples of 16": {"multiple": 16},
    "allocation: uniform": {"allocation": "uniform"},
    **{
        f"allocation: entropic, temperature {t}": {"allocation": "entropic", "temperature": t}
        for t in (0.01, 0.03, 0.1, 0.3, 1.0)
    },
}
PROMPTS = (8, 16, 32, 64, 128, 256, 512)
STEPS = (2, 5, 10, 20, 50)
SLIMSET, POOL, DRAWS = 32, 256, 3


class Ablations:
    """The trial on selection prompts, and the rows."""

    def __init__(self, work: Path) -> None:
        self.trial = Trial(Size(images=0, errors=24, runs=1), split="selection")
        self.unet = self.trial.pipe.unet
        self.work = work / "ablations"
        self.removable = removable(self.unet)
        settings = {
            "shares": SHARES,
            "calibration_prompts": CALIBRATION,
            "error_prompts": 24,
            "split": "selection",
            "sampling": SAMPLING,
        }
        self.rows = Rows("ablations", settings)

    def calibrated(self, texts: list[str], name: str, **changes: Any) -> slimdiff.Statistics:
        """Statistics of some prompts, kept under a name."""
        settings: dict[str, Any] = {"batch_size": BATCH, **SAMPLING, **changes}
        config = slimdiff.CalibrationConfig(**settings)
        pipe = self.trial.pipe
        return slimdiff.calibrate(pipe, texts, config, checkpoint=self.work / name)

    def base(self) -> slimdiff.Statistics:
        """What all changes of recipe and allocation work from."""
        return self.calibrated(prompts("calibration", CALIBRATION), "base")

    def errors(
        self, statistics: slimdiff.Statistics, recipe: Recipe = BASE, **how: Any
    ) -> dict[str, Any]:
        """Velocity error at each share."""
        RECIPES[recipe.name] = recipe
        allocation = how.pop("allocation", None)
        chosen: dict[str, Any] = {
            "recipe": recipe.name,
            "allocation": allocation,
            "layers": TRANSFORMER,
        }
        curves = measure_curves(self.unet, statistics, **chosen)
        found = {}
        for share in SHARES:
            budget = slimdiff.Budget(remove=int(share * self.removable))
            plan = slimdiff.allocate(self.unet, statistics, budget, **chosen, **how, curves=curves)
            slim = slimdiff.rewrite(self.trial.copy_of_denoiser(), statistics, plan, curves=curves)
            found[f"{share:.2f}"] = self.trial.velocity_error(slim).relative
        return {"errors": found}

    def variants(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Name and measurement of every row."""
        for name, change in RECIPE_CHANGES.items():
            recipe = replace(BASE, name=f"slimdiff/{name}", **change) if change else BASE
            yield name, lambda r=recipe: self.errors(self.base(), r)
        for name, how in ALLOCATIONS.items():
            yield name, lambda h=how: self.errors(self.base(), **h)
        yield (
            "timesteps weighted, early ones more",
            lambda: self.errors(
                self.calibrated(prompts("calibration", CALIBRATION), "log", timestep_weights="log")
            ),
        )
        for steps in STEPS:
            yield f"timesteps: {steps}", lambda n=steps: self.errors(self.stepped(n))
        for count in PROMPTS:
            yield f"prompts: {count}", lambda n=count: self.errors(self.first(n))
        yield f"SlimSet: {SLIMSET} of {POOL}", lambda: self.errors(self.slimset())
        for seed in range(DRAWS):
            name = f"random: {SLIMSET} of {POOL}, draw {seed}"
            yield name, lambda s=seed: self.errors(self.drawn(s))

    def stepped(self, steps: int) -> slimdiff.Statistics:
        """Calibrated with another number of denoising steps."""
        texts = prompts("calibration", CALIBRATION)
        return self.calibrated(texts, f"steps-{steps}", num_inference_steps=steps)

    def first(self, count: int) -> slimdiff.Statistics:
        """The first `count` prompts; sums of the parts between two counts add up."""
        edges = [0, *(n for n in PROMPTS if n <= count)]
        texts = prompts("calibration", count)
        parts = [
            self.calibrated(texts[start:stop], f"prompts-{start}-{stop}", seed=start)
            for start, stop in zip(edges, edges[1:])
        ]
        return slimdiff.Statistics.merge(parts)

    def pool(self) -> list[str]:
        """Prompts to choose from."""
        return prompts("calibration", POOL, seed=1)

    def slimset(self) -> slimdiff.Statistics:
        """Calibrated on the prompts that SlimSet selects."""
        chosen, _ = slimdiff.select_prompts(self.trial.pipe, self.pool(), SLIMSET, batch_size=BATCH)
        return self.calibrated(chosen, "slimset")

    def drawn(self, seed: int) -> slimdiff.Statistics:
        """Calibrated on prompts drawn at random."""
        chosen = random.Random(seed).sample(self.pool(), SLIMSET)
        return self.calibrated(chosen, f"random-{seed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    options = parser.parse_args()
    ablations = Ablations(options.work)
    for name, measure in ablations.variants():
        if options.only in name:
            ablations.rows.measure(name, measure)
    write_prompt_counts(ablations.rows.rows)


def write_prompt_counts(rows: dict[str, dict[str, Any]]) -> None:
    """Error by number of calibration prompts, for `slimdiff report`."""
    found = {int(n.split()[1]): r["errors"] for n, r in rows.items() if n.startswith("prompts: ")}
    counts = [{"prompts": n, "velocity_error": e["0.41"]} for n, e in sorted(found.items())]
    made = made_by(command=command())
    write(RESULTS / "prompt-counts.json", {"made": made, "prompt_counts": counts})


if __name__ == "__main__":
    main()
