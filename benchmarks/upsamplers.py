"""What does it buy to fuse an upsampler, that is, to convolve before doubling?

    python benchmarks/upsamplers.py       # goes on where it was stopped

The upsamplers of SD1.5 and SDXL at their native size, two rows, random weights: as diffusers runs
them against fused, in turn. Then plans for the bundled UNet under budgets of MACs with its
upsamplers fused and not, everything else alike; their figure is the velocity error on selection
prompts.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D

import slimdiff
from measuring import RESULTS, Rows
from rest import CALIBRATION, ERRORS, Rest
from slimdiff.evaluate import interleaved
from slimdiff.layer_timing import calling
from slimdiff.slim_denoiser import reshape_
from trial import SAMPLING

UPSAMPLERS = {
    "sd15 1280 channels from 8 by 8": (1280, 8),
    "sd15 1280 channels from 16 by 16": (1280, 16),
    "sd15 640 channels from 32 by 32": (640, 32),
    "sdxl 1280 channels from 32 by 32": (1280, 32),
    "sdxl 640 channels from 64 by 64": (640, 64),
}
MACS = (0.8, 0.65, 0.5)
RUNS = 11


def timings(rows: Rows) -> None:
    """A row for each upsampler, dtype and memory layout."""
    for name, (channels, side) in UPSAMPLERS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):

                def row(
                    channels: int = channels,
                    side: int = side,
                    dtype: torch.dtype = dtype,
                    layout: torch.memory_format = layout,
                ) -> dict[str, Any]:
                    return timed(channels, side, dtype, layout)

                how = "channels last" if layout is torch.channels_last else "channels first"
                rows.measure(f"{name}, {str(dtype).removeprefix('torch.')}, {how}", row)


def timed(
    channels: int, side: int, dtype: torch.dtype, layout: torch.memory_format
) -> dict[str, Any]:
    """Seconds of one upsampler both ways, and how far both are from float64."""
    torch.manual_seed(0)
    exact = Upsample2D(channels, use_conv=True).double()
    plain = copy.deepcopy(exact).to(dtype).to(memory_format=layout)
    slim = {"version": 1, "linears": {}, "attentions": {}, "fused_upsamplers": {"": 2}}
    fused = reshape_(copy.deepcopy(plain), slim)
    x = torch.randn(2, channels, side, side, dtype=torch.float64)
    given = x.to(dtype).contiguous(memory_format=layout)
    calls = {"plain": calling(plain, (given,), {}), "fused": calling(fused, (given,), {})}
    found = interleaved(calls, runs=RUNS, warmup=2)
    with torch.no_grad():
        want = exact(x)
        errors = {
            f"{label}_error": float((made(given).double() - want).norm() / want.norm())
            for label, made in (("plain", plain), ("fused", fused))
        }
    seconds = {label: timing.median for label, timing in found.items()}
    return seconds | {"speedup": found["plain"].speedup_of(found["fused"])} | errors


def plans(rest: Rest, rows: Rows) -> None:
    """A row for each budget, fused and not."""
    for macs in MACS:
        for fused in (False, True):

            def row(macs: float = macs, fused: bool = fused) -> dict[str, Any]:
                return rest.tried(slimdiff.Budget(macs=macs), fused=fused)

            rows.measure(f"{macs:.0%} of the MACs, {'fused' if fused else 'not fused'}", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = {"calibration_prompts": CALIBRATION, "error_prompts": ERRORS, "runs": RUNS}
    rows = Rows("upsamplers", settings | {"sampling": SAMPLING}, options.results)
    timings(rows)
    plans(Rest(options.work, options.results), rows)


if __name__ == "__main__":
    main()
