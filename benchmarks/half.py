"""Do slim models keep what float32 promised in bfloat16 and float16? Group by group and together.

    python benchmarks/half.py

Velocity error on the probes against the dense float32 outputs: of the dense model in half
precision, and of the slim one; and the growth of the largest weight and activation of each group
over its dense range.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slimdiff
from measuring import write
from slimdiff.reference.bundled import load_reference
from slimdiff.reference.captions import prompts
from slimdiff.widths import measure_curves
from trial import BATCH, SAMPLING

SHARES = (0.65, 0.5)
DTYPES = (torch.bfloat16, torch.float16)


def outputs(unet: nn.Module, calls: list[dict[str, Any]], dtype: torch.dtype) -> Tensor:
    """All outputs, in float64."""
    found = []
    with torch.inference_mode():
        for call in calls:
            cast = {
                k: v.to(dtype) if k != "timestep" and hasattr(v, "to") else v
                for k, v in call.items()
            }
            found.append(unet(**cast)[0].double())
    return torch.cat(found)


def relative(found: Tensor, dense: Tensor) -> float:
    return float((found - dense).square().sum() / dense.square().sum())


def between(layer: Any, x: Tensor) -> Tensor:
    """What a factored layer hands from its one half to the other."""
    if layer.weight.ndim == 2:
        return nn.functional.linear(x, layer.projection)
    return nn.functional.conv2d(x, layer.projection, None, layer.stride, layer.padding)


def ranges(unet: nn.Module, groups: Any, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Group -> largest |weight| and |activation| of its layers."""
    found: dict[str, list[float]] = {group.name: [0.0, 0.0] for group in groups}
    handles = []
    for group in groups:
        for path in group.paths.values():
            layer = unet.get_submodule(path)
            weights = [layer.weight, *([layer.projection] if hasattr(layer, "projection") else [])]
            largest = max(float(weight.detach().abs().max()) for weight in weights)
            found[group.name][0] = max(found[group.name][0], largest)

            def note(m: Any, args: Any, out: Tensor, name: str = group.name) -> None:
                seen = [out, *([between(m, args[0])] if hasattr(m, "projection") else [])]
                found[name][1] = max(found[name][1], *(float(x.abs().max()) for x in seen))

            handles.append(layer.register_forward_hook(note))
    outputs(unet, calls, torch.float32)
    for handle in handles:
        handle.remove()
    return found


def growth(unet: nn.Module, slim: nn.Module, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """How much larger the largest weight and activation of a group became, at most."""
    groups = slimdiff.groups_of(unet)
    before, after = ranges(unet, groups, calls), ranges(slim, groups, calls)
    found: dict[str, Any] = {}
    for i, what in enumerate(("weight", "activation")):
        times = {group.name: after[group.name][i] / before[group.name][i] for group in groups}
        name = max(times, key=lambda n: times[n])
        found[f"largest_growth_of_a_{what}"] = {"group": name, "times": times[name]}
        found[f"groups_whose_{what}_grows_over_2"] = sum(t > 2 for t in times.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    options = parser.parse_args()
    pipe = load_reference("scenes-unet", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    unet, folder = pipe.unet, options.work / "full" / "uniform"
    config = slimdiff.CalibrationConfig(batch_size=BATCH, **SAMPLING)
    statistics = slimdiff.calibrate(pipe, prompts("calibration", 128), config, checkpoint=folder)
    curves, calls = measure_curves(unet, statistics, folder=folder), statistics.probes.batches(8)
    exact = outputs(unet, calls, torch.float32)

    def lost(model: nn.Module, dtype: torch.dtype) -> float:
        return relative(outputs(copy.deepcopy(model).to(dtype), calls, dtype), exact)

    rows = []
    for share in SHARES:
        plan = slimdiff.allocate(
            unet, statistics, slimdiff.Budget(params=share), curves=curves, remove_layers=False
        )
        slim = slimdiff.rewrite(copy.deepcopy(unet), statistics, plan, curves=curves)
        errors = {_name(dtype): lost(slim, dtype) for dtype in (torch.float32, *DTYPES)}
        rows.append({"params_share": share, "errors": errors} | growth(unet, slim, calls))
        print(rows[-1], flush=True)
    write("half", {"dense": {_name(dtype): lost(unet, dtype) for dtype in DTYPES}, "rows": rows})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
