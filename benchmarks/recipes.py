"""Recipes side by side on the bundled pipeline, on its test prompts, in one run.

    python benchmarks/recipes.py

At each share of attention and feed-forward parameters removed: the velocity error along the dense
trajectory, scene accuracy with its 95 % interval, PSNR and SSIM to the dense images of the same
seeds. Calibration prompts and test prompts are disjoint, and neither was trained on.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from measuring import write

import slimdiff
from slimdiff import costs, evaluate
from slimdiff.pipeline import measure_curves
from slimdiff.reference.bundled import load_reference
from slimdiff.reference.captions import prompts
from slimdiff.reference.judge import scene_accuracy

SHARES = (0.20, 0.41, 0.60)
ROWS = (
    ("slimdiff", "probed"),
    ("paper", "uniform"),
    ("paper", "entropic"),
    ("magnitude", "threshold"),
)
SAMPLING = {"num_inference_steps": 20, "guidance_scale": 3.0}


def removable(unet: Any) -> int:
    """Parameters of attention and feed-forward that depend on a width."""
    groups = slimdiff.groups_of(unet)
    measured = costs.measure(unet, groups, costs.example_inputs(unet))
    return sum(measured.groups[g.name].of("params", g.width * g.heads) for g in groups)


def slim_denoisers(pipe: Any, options: argparse.Namespace) -> dict[tuple[float, str, str], Any]:
    """Every recipe at every share, all from one calibration."""
    config = slimdiff.CalibrationConfig(batch_size=16, **SAMPLING)
    texts = prompts("calibration", options.calibration_prompts)
    statistics = slimdiff.calibrate(pipe, texts, config, checkpoint=options.statistics)
    total, slim = removable(pipe.unet), {}
    for recipe, allocation in ROWS:
        start = time.perf_counter()
        curves = measure_curves(pipe.unet, statistics, recipe, allocation)
        for share in SHARES:
            budget = slimdiff.Budget(remove=int(share * total))
            how = {"recipe": recipe, "allocation": allocation, "curves": curves}
            plan = slimdiff.allocate(pipe.unet, statistics, budget, **how)
            unet = copy.deepcopy(pipe.unet)
            slim[share, recipe, allocation] = slimdiff.rewrite(
                unet, statistics, plan, curves=curves
            )
        print(f"{recipe} {allocation}: {time.perf_counter() - start:.1f} s for all shares")
    return slim


def images_of(pipe: Any, unet: Any, texts: list[str]) -> list[Any]:
    """Images of `texts` with the given denoiser; seeds 0, 1, 2, ..."""
    dense, pipe.unet = pipe.unet, unet
    try:
        return evaluate.generate(pipe, texts, range(len(texts)), batch_size=32, **SAMPLING)
    finally:
        pipe.unet = dense


def quality(images: list[Any], texts: list[str]) -> dict[str, Any]:
    """Scene accuracy with its interval, and by attribute."""
    accuracy = scene_accuracy(images, texts)
    return {
        "scene_accuracy": accuracy.whole,
        "interval": list(accuracy.interval),
        "attributes": accuracy.shares,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration-prompts", type=int, default=128)
    parser.add_argument("--test-prompts", type=int, default=512)
    parser.add_argument("--error-prompts", type=int, default=64)
    parser.add_argument("--statistics", type=Path, default=None, help="folder to resume from")
    parser.add_argument("--only", choices=slimdiff.RECIPES, help="rows of one recipe alone")
    options = parser.parse_args()
    pipe = load_reference("scenes-unet", torch.float32)
    for module in (pipe.unet, pipe.vae):
        module.to(memory_format=torch.channels_last)
    slim = {
        key: unet
        for key, unet in slim_denoisers(pipe, options).items()
        if options.only is None or options.only == key[1]
    }
    texts = prompts("test", options.test_prompts)
    named = {str(key): unet for key, unet in slim.items()}
    errors = evaluate.velocity_errors(
        pipe, named, texts[: options.error_prompts], batch_size=16, **SAMPLING
    )
    dense_images = images_of(pipe, pipe.unet, texts)
    dense = quality(dense_images, texts) | {"params": costs.parameters(pipe.unet)}
    print("dense", dense)
    rows = []
    for (share, recipe, allocation), unet in slim.items():
        images = images_of(pipe, unet, texts)
        row = {
            "removed_share": share,
            "recipe": recipe,
            "allocation": allocation,
            "params": costs.parameters(unet),
            "macs": unet.slim_record.plan.figures["macs"],
            "velocity_error": errors[str((share, recipe, allocation))].relative,
            "psnr": evaluate.psnr(images, dense_images),
            "ssim": evaluate.ssim(images, dense_images),
        } | quality(images, texts)
        print(row, flush=True)
        rows.append(row)
    write(
        "recipes" if options.only is None else f"recipes-{options.only}",
        {
            "model": "scenes-unet",
            "removable_params": removable(pipe.unet),
            "calibration_prompts": options.calibration_prompts,
            "test_prompts": options.test_prompts,
            "error_prompts": options.error_prompts,
            "sampling": SAMPLING,
            "dense": dense,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
