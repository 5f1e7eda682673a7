"""Train a model of the generalisation set and leave it as an ordinary diffusers pipeline.

The training framework of the references does the work: a stage whose file lies in the training
folder counts as done, so that autoencoder, text encoder and latents are laid there first.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from generalisation.emoji import CACHE
from generalisation.kinds import reference_of
from generalisation.specs import ModelSpec
from generalisation.worlds import SHARD, World, world_named
from slimdiff.evaluate import generate
from slimdiff.reference.contract import Reference
from slimdiff.reference.export import save, trained_pipeline
from slimdiff.reference.train import TrainConfig, Trainer

STEPS = 20
CALIBRATION, TEST, DRAWN = 512, 64, 32


def sampling_of(kind: str, world: World) -> dict[str, Any]:
    """How a pipeline is called; SD3's has no T5 encoder to give more tokens."""
    more = {"max_sequence_length": 1} if kind == "sd3" else {}
    return {"num_inference_steps": STEPS, "guidance_scale": world.guidance} | more


def train(spec: ModelSpec, folder: Path = CACHE) -> Path:
    """Train `spec`, or go on with it, and return the folder that it is exported to.

    The folder holds `pipeline`, `calibration.txt` and `test.txt`, `grid.png` and `model.json`.
    """
    out, run = folder / spec.name, folder / "runs" / spec.name
    kind, world = reference_of(spec), world_named(spec.world)
    prepare(spec, kind, world, folder, run)
    trainer = Trainer(config_of(spec, run, world), kind)
    trainer.run()
    return export(spec, kind, world, run, out)


def prepare(spec: ModelSpec, kind: Reference, world: World, folder: Path, run: Path) -> None:
    """Lay what needs no training into the training folder `run`."""
    run.mkdir(parents=True, exist_ok=True)
    shards = folder / "shards" / world.name
    for index in range(world.shards):
        world.fill(shards, index)
    if not (run / "shards").exists():
        (run / "shards").symlink_to(os.path.relpath(shards, run), target_is_directory=True)
    if not (run / "scaling.json").exists():
        (run / "scaling.json").write_text(json.dumps(world.scaling()))
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        trained = {"vae": kind.vae(), "text": kind.networks()["text"]}
    for name, module in trained.items():
        path = run / f"{name}.safetensors"
        if not path.exists():
            save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path)


def config_of(spec: ModelSpec, run: Path, world: World) -> TrainConfig:
    """The framework's settings for a specification."""
    return TrainConfig(
        reference=spec.name,
        out=run,
        steps=spec.steps,
        decay=spec.decay,
        batch=spec.batch,
        shard=SHARD,
        first_shards=world.shards,
        most_shards=world.shards,
        save_every=60.0,
        seed=spec.seed,
    )


def export(spec: ModelSpec, kind: Reference, world: World, run: Path, out: Path) -> Path:
    """Write the averaged weights as a pipeline, its prompts, and pictures of test prompts."""
    pipe, progress = trained_pipeline(run, kind)
    save(pipe, out / "pipeline")
    texts = {"calibration": CALIBRATION, "test": TEST}
    for split, count in texts.items():
        (out / f"{split}.txt").write_text("\n".join(world.prompts(split, count)) + "\n")
    sampling = sampling_of(spec.kind, world)
    told = {"spec": vars(spec), "progress": vars(progress), "sampling": sampling}
    (out / "model.json").write_text(json.dumps(told, indent=1) + "\n")
    pictures(out, sampling)
    return out


def pictures(out: Path, sampling: dict[str, Any]) -> None:
    """Draw the first test prompts into `grid.png`, eight in a row."""
    from slimdiff.checkpoint import load_pipeline

    pipe = load_pipeline(out / "pipeline", local_files_only=True)
    texts = (out / "test.txt").read_text().splitlines()[:DRAWN]
    with torch.autocast("cpu", torch.bfloat16):
        drawn = generate(pipe, texts, range(len(texts)), batch_size=16, **sampling)
    tiled(drawn).save(out / "grid.png")


def tiled(drawn: list[Any], columns: int = 8) -> Any:
    """Images of one size side by side, `columns` in a row."""
    from PIL import Image

    width, height = drawn[0].size
    whole = Image.new("RGB", (columns * width, -(-len(drawn) // columns) * height))
    for place, image in enumerate(drawn):
        whole.paste(image, (place % columns * width, place // columns * height))
    return whole
