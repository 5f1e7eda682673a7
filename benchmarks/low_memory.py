"""Peak memory of rewriting a FLUX-wide denoiser from shards to shards, with generated weights.

    python benchmarks/low_memory.py --double 2 --single 2

Blocks have FLUX.1's width (3072 channels, 24 heads, 12288 hidden units) in bfloat16; the number of
blocks changes time, not memory, because one block is in memory at a time. Weights and statistics
are random and lie in a temporary folder. The plan is uniform.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import slimdiff
from measuring import Stages, write
from slimdiff import costs
from slimdiff.bundles import Allocation
from slimdiff.config import recipe_named
from slimdiff.groups import Group
from slimdiff.planning import make_plan
from slimdiff.shards import ShardWriter
from slimdiff.statistics_file import WEIGHTS_FILE
from slimdiff.streaming import on_meta, rewrite_folder

ROWS = 2048


def generate(folder: Path, config: dict[str, Any]) -> torch.nn.Module:
    """A folder of random bfloat16 weights, written shard by shard; the model is on meta."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(**config)
    denoiser.save_config(str(folder))
    writer = ShardWriter(folder, "diffusion_pytorch_model", None, 2 * 2**30)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in denoiser.named_parameters():
        scale = parameter.shape[-1] ** -0.5
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * scale
        writer.add(name, values.bfloat16())
    writer.close()
    return on_meta(folder)


def record(folder: Path, groups: list[Group], channels: int) -> None:
    """Statistics of random activations, float32, one sum at a time in memory as far as it goes."""
    statistics = slimdiff.Statistics("FluxTransformer2DModel", slimdiff.statistics.Probes(1))
    statistics.calls = 1
    generator = torch.Generator().manual_seed(1)
    for group in groups:
        what = {"value_output": "z", "feed_forward": "h", "modulation": "x"}[group.kind]
        name = f"{group.source or group.layer}/{what}"
        width = channels if group.kind == "modulation" else group.inner
        if name in statistics.sums:
            continue
        x = torch.randn(ROWS, width, generator=generator)
        statistics.add(name, x.T @ x, ROWS)
        statistics.add(f"{name}_magnitude", x.abs().sum(0), ROWS)
    statistics.save(folder)
    assert (folder / WEIGHTS_FILE).is_file()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=2)
    parser.add_argument("--params", type=float, default=0.7)
    options = parser.parse_args()
    config = {
        "num_layers": options.double,
        "num_single_layers": options.single,
        "guidance_embeds": True,
    }
    stages = Stages()
    with tempfile.TemporaryDirectory() as work:
        dense, kept, out = (Path(work) / name for name in ("dense", "statistics", "slim"))
        dense.mkdir()
        denoiser = generate(dense, config)
        groups = slimdiff.groups_of(denoiser)
        record(kept, groups, 3072)
        counted = costs.measure(denoiser, groups, costs.example_inputs(denoiser))
        plan = make_plan(
            "FluxTransformer2DModel",
            groups,
            counted,
            {},
            slimdiff.Statistics.open(kept),
            slimdiff.Budget(params=options.params),
            recipe_named("slimdiff"),
            Allocation("uniform"),
        )
        stages.model_is_built()
        with stages.stage("rewrite"):
            rewrite_folder(dense, out, slimdiff.Statistics.open(kept), plan)
        slim = sum(path.stat().st_size for path in out.glob("*model*.safetensors"))
    write(
        "low-memory",
        {
            "blocks": config,
            "params": counted.params,
            "plan": plan.figures,
            "bytes_slim": slim,
            "process_before_gib": round(stages.base_gib, 2),
            "stages": stages.rows,
        },
    )


if __name__ == "__main__":
    main()
