"""Train a model of the generalisation set and leave it as an ordinary diffusers pipeline.

The training framework of the references does the work: a stage whose file lies in the training
folder counts as done, so that the trained text encoder is laid there first.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from generalisation.kinds import reference_of
from generalisation.specs import ModelSpec
from generalisation.worlds import distinct, world_named
from measuring import HERE
from slimdiff.evaluate import generate
from slimdiff.reference.export import save, trained_pipeline
from slimdiff.reference.train import TrainConfig, Trainer

CACHE = HERE / "cache" / "generalisation"
STEPS, SHARD, SHARDS = 20, 2048, 4
CALIBRATION, TEST, DRAWN = 512, 64, 32


def train(spec: ModelSpec, folder: Path = CACHE) -> Path:
    """Train `spec`, or go on with it, and return the folder that it is exported to.

    The folder holds `pipeline`, `calibration.txt` and `test.txt`, `grid.png` and `model.json`.
    """
    out, run = folder / spec.name, folder / "runs" / spec.name
    kind = reference_of(spec)
    prepare(spec, kind, folder, run)
    Trainer(config_of(spec, run), kind).run()
    return export(spec, kind, run, out)


def prepare(spec: ModelSpec, kind: Any, folder: Path, run: Path) -> None:
    """Lay the trained text encoder into the training folder `run`, and its world's pictures."""
    run.mkdir(parents=True, exist_ok=True)
    shards = folder / "shards" / spec.world
    shards.mkdir(parents=True, exist_ok=True)
    if not (run / "shards").exists():
        (run / "shards").symlink_to(os.path.relpath(shards, run), target_is_directory=True)
    path = run / "text.safetensors"
    if not path.exists():
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)
            text = kind.networks()["text"]
        world_named(spec.world).teach(spec.kind, text)
        save_file({k: v.contiguous() for k, v in text.state_dict().items()}, path)


def config_of(spec: ModelSpec, run: Path) -> TrainConfig:
    """The framework's settings for a specification."""
    return TrainConfig(
        out=run,
        steps=spec.steps,
        decay=spec.decay,
        batch=spec.batch,
        vae_from=world_named(spec.world).vae,
        shard=SHARD,
        first_shards=SHARDS,
        most_shards=SHARDS,
        save_every=60.0,
        seed=spec.seed,
    )


def export(spec: ModelSpec, kind: Any, run: Path, out: Path) -> Path:
    """Write the averaged weights as a pipeline, its prompts, and pictures of test prompts."""
    pipe, progress = trained_pipeline(run, kind)
    save(pipe, out / "pipeline")
    for split, count in (("calibration", CALIBRATION), ("test", TEST)):
        (out / f"{split}.txt").write_text("\n".join(distinct(kind.world, split, count)) + "\n")
    sampling = {"num_inference_steps": STEPS} | next(iter(kind.sampling.values()))
    judged = judge(out, kind, sampling)
    told = {"spec": vars(spec), "progress": vars(progress), "sampling": sampling, "judge": judged}
    (out / "model.json").write_text(json.dumps(told, indent=1) + "\n")
    return out


def judge(out: Path, kind: Any, sampling: dict[str, Any]) -> str:
    """Draw the first test prompts into `grid.png`, eight in a row, and say what is right."""
    from slimdiff.checkpoint import load_pipeline

    pipe = load_pipeline(out / "pipeline", local_files_only=True)
    texts = (out / "test.txt").read_text().splitlines()[:DRAWN]
    with torch.autocast("cpu", torch.bfloat16):
        drawn = generate(pipe, texts, range(len(texts)), batch_size=16, **sampling)
    tiled(drawn).save(out / "grid.png")
    return str(kind.world.judge(drawn, texts))


def tiled(drawn: list[Any], columns: int = 8) -> Any:
    """Images of one size side by side, `columns` in a row."""
    from PIL import Image

    width, height = drawn[0].size
    whole = Image.new("RGB", (columns * width, -(-len(drawn) // columns) * height))
    for place, image in enumerate(drawn):
        whole.paste(image, (place % columns * width, place // columns * height))
    return whole
