"""Package a trained reference: `python -m slimdiff.reference.export --reference NAME --run RUN`.

Writes the averaged weights as a pipeline folder in float16, measures it on prompts of the test
split, and writes the model card from what was measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slimdiff.reference.accuracy import Accuracy
from slimdiff.reference.card import STEPS, Figures, card
from slimdiff.reference.contract import Reference
from slimdiff.reference.references import TRAINABLE, reference
from slimdiff.reference.state import Progress, averages, load_state
from slimdiff.reference.world import World

MACHINE = "two CPU cores that did other work too"

log = logging.getLogger(__name__)


def trained_pipeline(run: Path, kind: Reference) -> tuple[Any, Progress]:
    """The pipeline of a training folder, with averaged weights in float32, and its progress."""
    from safetensors.torch import load_file

    vae, networks = kind.vae().eval(), kind.networks()
    vae.load_state_dict(load_file(run / "vae.safetensors"))
    state, progress = load_state(run / "state.safetensors")
    for name, network in networks.items():
        load_average(network.eval(), state, name)
    scaling = json.loads((run / "scaling.json").read_text())
    pipe = kind.assemble(vae, networks, scaling)
    pipe.set_progress_bar_config(disable=True)
    return pipe, progress


def load_average(network: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Give `network` the averaged weights that a checkpoint holds under `name`; buffers stay.

    Raises:
        RuntimeError: a weight is missing or has another shape.
    """
    trained = {k for k, _ in network.named_parameters()}
    buffers = {k: t for k, t in network.state_dict().items() if k not in trained}
    network.load_state_dict(buffers | averages(state, name))


def generate(
    pipe: Any,
    captions: list[str],
    seed: int = 0,
    *,
    chunk: int = 32,
    steps: int = STEPS,
    bfloat16: bool = False,
    **options: Any,
) -> NDArray[np.float32]:
    """Images (n, 64, 64, 3) from 0 to 1; the k-th one's noise depends only on `seed` and k.

    `options` are the pipeline's own, such as `guidance_scale`.
    """
    parts = []
    for start in range(0, len(captions), chunk):
        texts = captions[start : start + chunk]
        ids = range(start, start + len(texts))
        generators = [torch.Generator().manual_seed((seed << 32) + i) for i in ids]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            made = pipe(
                texts,
                num_inference_steps=steps,
                generator=generators,
                output_type="np",
                **options,
            )
        parts.append(made.images)
    return np.concatenate(parts)


def judge_accuracy(world: World, n: int = 1000, seed: int = 0) -> Accuracy:
    """The judge on `n` ground-truth renders: how far its word can be trusted."""
    drawn = world.draw("test", n, seed)
    return world.judge(_images(drawn.pixels), drawn.captions)


@torch.no_grad()
def autoencoder_accuracy(vae: Any, world: World, n: int = 128, seed: int = 0) -> Accuracy:
    """The judge on renders that went through `vae`: the most that the pipeline can reach."""
    drawn = world.draw("test", n, seed)
    parts = [vae.decode(vae.encode(p).latent_dist.mean).sample for p in drawn.pixels.split(32)]
    return world.judge(_images(torch.cat(parts)), drawn.captions)


def _images(pixels: Tensor) -> NDArray[np.float32]:
    """(n, 3, 64, 64) from -1 to 1 as images (n, 64, 64, 3) from 0 to 1."""
    return (pixels.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1).numpy()


def save(pipe: Any, folder: Path) -> None:
    """Replace `folder` by the pipeline in float16 safetensors.

    Configurations of text encoders say float32: transformers loads the precision that they name,
    diffusers float32, and a pipeline loaded without a dtype must not mix the two.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(torch.float16)
    pipe.save_pretrained(partial, safe_serialization=True)
    for path in partial.glob("text_encoder*/config.json"):
        config = json.loads(path.read_text()) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def measure(pipe: Any, kind: Reference, counts: list[int]) -> dict[str, Accuracy]:
    """Accuracy on prompts of the test split, for each way to call the pipeline.

    The first way is measured on `counts[0]` prompts, the others on `counts[-1]`.
    """
    rows: dict[str, Accuracy] = {}
    for label, options in kind.sampling.items():
        captions = kind.world.prompts("test", counts[-1] if rows else counts[0])
        rows[label] = kind.world.judge(generate(pipe, captions, **options), captions)
        log.info("%s: %s", label, rows[label])
    return rows


def package(
    name: str, run: Path, folder: Path, counts: list[int], machine: str, note: str = ""
) -> Figures:
    """Export the training folder `run` of the reference `name` to `folder`, measured."""
    kind = reference(name)
    pipe, progress = trained_pipeline(run, kind)
    world = kind.world
    judged = (judge_accuracy(world), autoencoder_accuracy(pipe.vae, world))
    figures = Figures(progress, *judged, measure(pipe, kind, counts))
    text = card(name, kind, pipe, figures, machine, note)
    save(pipe, folder)
    (folder / "README.md").write_text(text)
    (folder / "measured.json").write_text(json.dumps(figures.record(), indent=2) + "\n")
    return figures


def main() -> None:
    """Package as the command line says."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description="Package a trained reference pipeline.")
    names = list(TRAINABLE)
    parser.add_argument("--reference", choices=names, default=names[0], help="what was trained")
    parser.add_argument("--run", type=Path, required=True, help="training folder")
    parser.add_argument("--to", type=Path, required=True, help="folder of the pipeline, replaced")
    help = "test prompts, and how many for each further way to call it (default: 512)"
    parser.add_argument("--prompts", type=int, nargs="+", default=[512], help=help)
    help = f"what it was trained on (default: {MACHINE})"
    parser.add_argument("--machine", default=MACHINE, help=help)
    parser.add_argument("--note", default="", help="a paragraph for the card, on the training")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    o = options
    package(o.reference, o.run, o.to, o.prompts, o.machine, o.note)


if __name__ == "__main__":
    main()
