"""Is calibrating again halfway worth it? Two steps against one, at equal size, in one run.

    python benchmarks/halfway.py       # goes on where it was stopped

In two steps half of what is to go goes, what is left is calibrated again, and then the rest goes: a
slim pipeline is slimmed once more. The velocity error is that along the dense trajectory of
held-out selection prompts.
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

SHARES, STEPS, CALIBRATION, ERRORS = (0.35, 0.50, 0.60, 0.70), (1, 2), 64, 48


def measured(trial: Trial, share: float, steps: int, work: Path) -> dict[str, Any]:
    """The dense pipeline slimmed in one step or several, and what it loses."""
    pipe = trial.with_denoiser(trial.copy_of_denoiser())
    config = slimdiff.CalibrationConfig(batch_size=BATCH, **trial.sampling)
    texts, dense = prompts("calibration", CALIBRATION), costs.parameters(pipe.unet)
    for step in range(1, steps + 1):
        budget = slimdiff.Budget(remove=int(dense * share * step / steps) - _gone(dense, pipe))
        folder = work / "halfway" / (f"{share}-{step}" if step > 1 else "dense")
        slimdiff.compress(pipe, texts, budget, config=config, checkpoint=folder)
    found = {"share": share, "steps": steps, "params": costs.parameters(pipe.unet)}
    return found | {"velocity_error": trial.velocity_error(pipe.unet).relative}


def _gone(dense: int, pipe: Any) -> int:
    return dense - costs.parameters(pipe.unet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    options = parser.parse_args()
    settings = {"calibration_prompts": CALIBRATION, "error_prompts": ERRORS, "split": "selection"}
    trial = Trial(Size(images=0, errors=ERRORS, runs=1), split="selection")
    rows = Rows("halfway", settings)
    for share in SHARES:
        for steps in STEPS:
            if options.only in (name := f"{share:.0%} in {steps}"):
                rows.measure(name, lambda s=share, n=steps: measured(trial, s, n, options.work))


if __name__ == "__main__":
    main()
