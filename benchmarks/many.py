"""Scene accuracy of dense and slim on many test prompts, with narrow intervals.

    python benchmarks/many.py --prompts 2048      # goes on where it was stopped

Half of the bundled UNet's parameters are removed after calibration on 128 prompts. Both pipelines
draw under bfloat16 autocast, which is two times faster here; everything else is done in float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import slimdiff
from measuring import Rows
from slimdiff import costs
from slimdiff.evaluate import generate
from slimdiff.reference.captions import prompts
from slimdiff.reference.judge import scene_accuracy
from trial import BATCH, SAMPLING, Size, Trial

PARAMS, CALIBRATION, CHUNK = 0.5, 128, 128


def slimmed(trial: Trial, work: Path) -> Any:
    """The pipeline with half of its UNet."""
    config = slimdiff.CalibrationConfig(batch_size=BATCH, **SAMPLING)
    texts = prompts("calibration", CALIBRATION)
    statistics = slimdiff.calibrate(trial.pipe, texts, config, checkpoint=work / "many")
    plan = slimdiff.allocate(trial.dense, statistics, slimdiff.Budget(params=PARAMS))
    slim = slimdiff.rewrite(trial.copy_of_denoiser(), statistics, plan)
    return trial.with_denoiser(slim.eval().to(memory_format=torch.channels_last))


def chunk(pipe: Any, unet: Any, start: int, stop: int) -> dict[str, Any]:
    """How many of some prompts' scenes are right."""
    texts = prompts("test", stop)[start:]
    with torch.autocast("cpu", torch.bfloat16):
        images = generate(pipe, texts, range(start, stop), batch_size=32, **SAMPLING)
    found = scene_accuracy(images, texts)
    right = round(found.whole * len(texts))
    return {"params": costs.parameters(unet), "right": right, "of": len(texts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    options = parser.parse_args()
    trial = Trial(Size(images=1, errors=1, runs=1))
    pipes = {"dense": trial.pipe, "slim": slimmed(trial, options.work)}
    settings = {"params": PARAMS, "calibration_prompts": CALIBRATION, "sampling": SAMPLING}
    rows = Rows("many", settings | {"autocast": "bfloat16"})
    for start in range(0, options.prompts, CHUNK):
        for name, pipe in pipes.items():
            stop = min(start + CHUNK, options.prompts)
            unet, key = pipe.unet, f"{name} {start} to {stop}"
            rows.measure(key, lambda p=pipe, u=unet, a=start, b=stop: chunk(p, u, a, b))


if __name__ == "__main__":
    main()
