"""Would narrower layers at some timesteps and wider ones at others lose less than one width?

    python benchmarks/elastic.py

Slim factors span nested spaces, so one slim model could run at two widths. Plans are made at
several shares of the MACs; for each pair of them, the timesteps that bear it best run the cheaper
plan, as many as give the same mean as one plan for all. The figure is the velocity error on
selection prompts along the dense trajectory; the assignment of timesteps is chosen on one half of
the prompts and judged on the other.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import slimdiff
from measuring import write
from slimdiff.evaluate import VelocityError
from slimdiff.reference.captions import prompts
from slimdiff.widths import measure_curves
from trial import BATCH, SAMPLING, Size, Trial

SHARES = (0.55, 0.65, 0.75, 0.85)
MIDDLES = (0.65, 0.75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    options = parser.parse_args()
    trial = Trial(Size(images=0, errors=32, runs=1), split="selection")
    unet = trial.pipe.unet
    config = slimdiff.CalibrationConfig(batch_size=BATCH, **SAMPLING)
    texts = prompts("calibration", 128)
    folder = options.work / "full" / "uniform"
    statistics = slimdiff.calibrate(trial.pipe, texts, config, checkpoint=folder)
    curves = measure_curves(unet, statistics, folder=folder)
    errors: dict[float, list[VelocityError]] = {}
    for share in SHARES:
        budget = slimdiff.Budget(macs=share)
        plan = slimdiff.allocate(unet, statistics, budget, curves=curves)
        slim = slimdiff.rewrite(trial.copy_of_denoiser(), statistics, plan, curves=curves)
        whole = trial.calls
        errors[share] = []
        for half in (0, 1):
            trial.calls = whole[half * len(whole) // 2 : (half + 1) * len(whole) // 2]
            errors[share].append(trial.velocity_error(slim))
        trial.calls = whole
        print(share, [error.relative for error in errors[share]], flush=True)
    rows = [found for middle in MIDDLES for found in schedules(errors, middle)]
    for row in rows:
        print(row)
    write("elastic", {"calibration_prompts": len(texts), "error_prompts": 32, "rows": rows})


def schedules(errors: dict[float, list[VelocityError]], middle: float) -> list[dict[str, Any]]:
    """One row for each pair of plans around `middle`."""
    rows = []
    for low, high in itertools.combinations(sorted(errors), 2):
        if not low < middle < high:
            continue
        chosen, judged = ({share: e[half] for share, e in errors.items()} for half in (0, 1))
        steps = list(chosen[low].squared)
        cheap = round(len(steps) * (high - middle) / (high - low))
        extra = {t: chosen[low].squared[t] - chosen[high].squared[t] for t in steps}
        bearing = set(sorted(steps, key=extra.__getitem__)[:cheap])
        squared = sum(judged[low if t in bearing else high].squared[t] for t in steps)
        two = squared / sum(judged[low].energy.values())
        rows.append(
            {
                "macs": middle,
                "low": low,
                "high": high,
                "cheap_steps": cheap,
                "steps": len(steps),
                "one_width": judged[middle].relative,
                "two_widths": two,
                "ratio": two / judged[middle].relative,
            }
        )
    return rows


if __name__ == "__main__":
    main()
