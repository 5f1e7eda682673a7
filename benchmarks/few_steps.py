"""Calibrated at few steps, sampled at many: what a slim scenes-dit says it lost, and what it loses.

    python benchmarks/few_steps.py        # some minutes

Modulations see the timestep alone: at four steps their moments would have four directions, were
they not completed over the whole range of timesteps.
"""

from __future__ import annotations

import argparse
import copy
import functools

import torch

import slimdiff
from measuring import Rows
from slimdiff.evaluate import velocity_error
from slimdiff.reference.bundled import load_reference
from slimdiff.reference.references import reference, sampling_of

NAME, BATCH = "scenes-dit", 16
CALIBRATED_AT, SAMPLED_AT = 4, (4, 8, 20, 50)
PROMPTS, TESTS = 64, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", default="0.8", help="share of the parameters that stays")
    options = parser.parse_args()
    sampling = sampling_of(NAME)
    settings = {"model": NAME, "calibrated_at": CALIBRATED_AT, "prompts": PROMPTS}
    rows = Rows("few-steps", settings | {"tests": TESTS, "params": options.params})
    dense = load_reference(NAME, torch.float32)
    world, slim = reference(NAME).world, copy.deepcopy(dense)
    config = slimdiff.CalibrationConfig(CALIBRATED_AT, batch_size=BATCH, **sampling)
    texts = world.prompts("calibration", PROMPTS)
    plan = slimdiff.compress(slim, texts, slimdiff.Budget(params=options.params), config=config)
    names = ("error_on_probes", "error_interval", "error_on_seen", "refit")
    stated = {name: plan.figures[name] for name in names if name in plan.figures}
    rows.measure("stated", lambda: stated)
    for steps in SAMPLED_AT:
        how = sampling | {"num_inference_steps": steps, "batch_size": BATCH}
        error = velocity_error(dense, slim, world.prompts("test", TESTS), **how).relative
        rows.measure(f"sampled at {steps} steps", functools.partial(dict, velocity_error=error))


if __name__ == "__main__":
    main()
