"""Is calibrating again on the way worth it? Rounds against one shot, at equal size, in one run.

    python benchmarks/rounds.py       # goes on where it was stopped

The velocity error is that along the dense trajectory of held-out selection prompts. Which outcome
is kept, that of the rounds or that of one shot, is decided on held-out probes, as `compress` does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import slimdiff
from measuring import Rows
from slimdiff import costs
from slimdiff.reference.captions import prompts
from trial import BATCH, Size, Trial

SHARES, ROUNDS, CALIBRATION, ERRORS = (0.35, 0.50, 0.60, 0.70), (1, 2), 64, 48


def measured(trial: Trial, share: float, rounds: int, folder: Path) -> dict[str, Any]:
    """One compression from the dense pipeline, and what it loses."""
    pipe = trial.with_denoiser(trial.copy_of_denoiser())
    config = slimdiff.CalibrationConfig(batch_size=BATCH, **trial.sampling)
    texts, budget = prompts("calibration", CALIBRATION), slimdiff.Budget(params=1 - share)
    plan = slimdiff.compress(
        pipe, texts, budget, rounds=rounds, config=config, checkpoint=folder / "rounds"
    )
    figures = plan.figures
    told = figures.get("rounds", {})
    return {
        "share": share,
        "rounds": rounds,
        "params": costs.parameters(pipe.unet),
        "kept": told.get("kept"),
        "one_shot_on_probes": told.get("error_one_shot", figures["error_on_probes"]),
        "rounds_on_probes": told.get("error"),
        "velocity_error": trial.velocity_error(pipe.unet).relative,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    options = parser.parse_args()
    settings = {"calibration_prompts": CALIBRATION, "error_prompts": ERRORS, "split": "selection"}
    trial = Trial(Size(images=0, errors=ERRORS, runs=1), split="selection")
    rows = Rows("rounds", settings)
    for share in SHARES:
        for rounds in ROUNDS:
            if options.only in (name := f"{share:.0%} in {rounds}"):
                rows.measure(name, lambda s=share, n=rounds: measured(trial, s, n, options.work))


if __name__ == "__main__":
    main()
