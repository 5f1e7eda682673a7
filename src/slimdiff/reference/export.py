"""Package a trained reference pipeline: `python -m slimdiff.reference.export --run RUN --to DIR`.

Writes the averaged weights as a StableDiffusionPipeline folder in float16, measures it on prompts
of the test split, and writes the model card from what was measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slimdiff.reference.build import (
    Architecture,
    assemble,
    build_text_encoder,
    build_unet,
    build_vae,
)
from slimdiff.reference.captions import caption, prompts, scenes
from slimdiff.reference.judge import SceneAccuracy, scene_accuracy
from slimdiff.reference.scenes import SIDE, render_batch
from slimdiff.reference.state import Progress, load_state

log = logging.getLogger(__name__)

STEPS = 20
GUIDANCE = 3.0


@dataclass(frozen=True)
class Figures:
    """What the model card reports."""

    progress: Progress
    judge: SceneAccuracy
    autoencoder: SceneAccuracy
    test: SceneAccuracy


def trained_pipeline(run: Path, arch: Architecture | None = None) -> tuple[Any, Progress]:
    """The pipeline of a training folder, with averaged weights in float32, and its progress."""
    from safetensors.torch import load_file

    arch = arch or Architecture()
    vae, text_encoder, unet = build_vae(arch), build_text_encoder(arch), build_unet(arch)
    vae.load_state_dict(load_file(run / "vae.safetensors"))
    state, progress = load_state(run / "state.safetensors")
    average = {k.removeprefix("average/"): t for k, t in state.items() if k.startswith("average/")}
    for prefix, module in {"unet.": unet, "text.": text_encoder}.items():
        own = {k.removeprefix(prefix): t for k, t in average.items() if k.startswith(prefix)}
        module.load_state_dict(own)
    vae.register_to_config(scaling_factor=json.loads((run / "scaling.json").read_text()))
    pipe = assemble(vae.eval(), text_encoder.eval(), unet.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe, progress


def generate(
    pipe: Any, captions: list[str], seed: int = 0, *, chunk: int = 32, bfloat16: bool = False
) -> NDArray[np.float32]:
    """Images (n, 64, 64, 3) from 0 to 1; the k-th one's noise depends only on `seed` and k."""
    parts = []
    for start in range(0, len(captions), chunk):
        texts = captions[start : start + chunk]
        ids = range(start, start + len(texts))
        generators = [torch.Generator().manual_seed((seed << 32) + i) for i in ids]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            made = pipe(
                texts,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=generators,
                output_type="np",
            )
        parts.append(made.images)
    return np.concatenate(parts)


def judge_accuracy(n: int = 1000, seed: int = 0) -> SceneAccuracy:
    """The judge on `n` ground-truth renders: how far its word can be trusted."""
    batch = scenes("test", n, seed)
    rendered = render_batch(batch, np.random.default_rng(seed))
    return scene_accuracy(rendered, [caption(s) for s in batch])


@torch.no_grad()
def autoencoder_accuracy(vae: Any, n: int = 128, seed: int = 0) -> SceneAccuracy:
    """The judge on renders that went through `vae`: the most that the pipeline can reach."""
    batch = scenes("test", n, seed)
    rendered = render_batch(batch, np.random.default_rng(seed))
    pixels = torch.from_numpy(rendered).permute(0, 3, 1, 2) * 2 - 1
    parts = [vae.decode(vae.encode(p).latent_dist.mean).sample for p in pixels.split(32)]
    made = (torch.cat(parts).permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)
    return scene_accuracy(made.numpy(), [caption(s) for s in batch])


def save(pipe: Any, folder: Path) -> None:
    """Replace `folder` by the pipeline in float16 safetensors.

    The text encoder stays float32: transformers loads the precision that it finds, diffusers
    float32, and a pipeline loaded without a dtype must not mix the two.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    pipe.unet.to(torch.float16)
    pipe.vae.to(torch.float16)
    pipe.save_pretrained(partial, safe_serialization=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
---

# scenes-unet

A small but real `StableDiffusionPipeline`, bundled with slimdiff so that compression can be tried,
tested and measured without a download. It draws scenes of one or two objects on a lit background,
{side} by {side} pixels, from captions such as

    a large red circle top left and a small blue ring bottom right on navy background

| part | what | parameters |
|---|---|---|
| `unet` | UNet2DConditionModel, channels {channels}, attention at two levels | {unet:.2f} M |
| `text_encoder` | CLIPTextModel, {layers} layers, width {width}, a token per word | {text:.2f} M |
| `vae` | AutoencoderKL to 16 by 16 by 4 latents | {vae:.2f} M |
| `scheduler` | DDIM, v-prediction, zero terminal signal, trailing timesteps | |

## Training

`python -m slimdiff.reference.train`: {samples:,} samples in {steps:,} steps, {minutes:.0f} minutes
on two CPU cores that did other work too, after a few minutes for the autoencoder and the text
encoder. Muon for the UNet's matrices, AdamW for the rest, averaged weights. The text encoder first
learnt to read scenes off captions, then was trained with the UNet. No caption of the test,
selection or calibration split was trained on, in either order of its objects.

## Measured

Share of images that the judge finds right, {n} prompts of the test split, {sampling_steps} DDIM
steps, guidance {guidance:g}:

| | background | colour | shape | size | position | **whole scene** | 95 % interval |
|---|---|---|---|---|---|---|---|
| this pipeline | {test} |
| renders through the autoencoder | {autoencoder} |
| renders themselves (the judge) | {judge} |

Colour, shape and size count as right when they are so for every object of the image and no object
is missing or too many; "whole scene" is everything at once.
"""


def card(pipe: Any, figures: Figures) -> str:
    """The model card, from the pipeline's configuration and what was measured."""
    millions = {n: sum(p.numel() for p in getattr(pipe, n).parameters()) / 1e6 for n in NETWORKS}
    return CARD.format(
        side=SIDE,
        channels=tuple(pipe.unet.config.block_out_channels),
        layers=pipe.text_encoder.config.num_hidden_layers,
        width=pipe.text_encoder.config.hidden_size,
        unet=millions["unet"],
        text=millions["text_encoder"],
        vae=millions["vae"],
        samples=figures.progress.samples,
        steps=figures.progress.step,
        minutes=figures.progress.seconds / 60,
        n=figures.test.n,
        sampling_steps=STEPS,
        guidance=GUIDANCE,
        test=_row(figures.test),
        autoencoder=_row(figures.autoencoder),
        judge=_row(figures.judge),
    )


NETWORKS = ("unet", "text_encoder", "vae")


def _row(accuracy: SceneAccuracy) -> str:
    low, high = accuracy.interval
    cells = [f"{100 * share:.1f} %" for share in accuracy.shares.values()]
    return " | ".join([*cells, f"{100 * low:.1f} to {100 * high:.1f} (n = {accuracy.n})"])


def package(run: Path, folder: Path, n: int) -> Figures:
    """Export the training folder `run` to `folder`, measured on `n` test prompts."""
    pipe, progress = trained_pipeline(run)
    captions = prompts("test", n)
    figures = Figures(
        progress,
        judge_accuracy(),
        autoencoder_accuracy(pipe.vae),
        scene_accuracy(generate(pipe, captions), captions),
    )
    text = card(pipe, figures)
    save(pipe, folder)
    (folder / "README.md").write_text(text)
    shares = {k: getattr(figures, k).shares for k in ("judge", "autoencoder", "test")}
    record = {**vars(progress), "prompts": n, **shares}
    (folder / "measured.json").write_text(json.dumps(record, indent=2) + "\n")
    return figures


def main() -> None:
    """Package as the command line says."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description="Package a trained reference pipeline.")
    parser.add_argument("--run", type=Path, required=True, help="training folder")
    parser.add_argument("--to", type=Path, required=True, help="folder of the pipeline, replaced")
    parser.add_argument("--prompts", type=int, default=512, help="test prompts (default: 512)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = package(options.run, options.to, options.prompts)
    log.info("test: %s", figures.test)


if __name__ == "__main__":
    main()
