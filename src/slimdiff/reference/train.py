"""Train the reference pipeline: `python -m slimdiff.reference.train --out runs/scenes-unet`.

Three stages: autoencoder, text encoder (both minutes), then the denoiser together with the text
encoder. Every stage leaves its result in `out`; a second call continues where the first stopped,
and gives the weights that an uninterrupted call would have given. On a machine that does other
work too, `slimdiff.reference.parallel` says how to start it.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.reference.build import (
    Architecture,
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
)
from slimdiff.reference.captions import scenes
from slimdiff.reference.data import Pool, encode, images
from slimdiff.reference.objective import Denoising, PlainAttention
from slimdiff.reference.optim import Optimizer, Rates
from slimdiff.reference.parallel import (
    agree,
    average_gradients,
    join_group,
    leave_group,
    rank,
    wait,
)
from slimdiff.reference.pretrain import train_text, train_vae
from slimdiff.reference.state import Progress, load_state, save_state

log = logging.getLogger(__name__)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train."""

    out: Path = _option(Path("runs/scenes-unet"), "folder of checkpoints and of the pipeline")
    steps: int = _option(1050, "denoiser steps in all")
    minutes: float = _option(0.0, "if not 0, end the denoiser's training after so many minutes")
    decay: float = _option(0.4, "share of training over which the rate falls to 0 at the end")
    batch: int = _option(64, "scenes per step")
    vae_steps: int = _option(1100, "autoencoder steps")
    text_steps: int = _option(250, "text encoder steps before it is trained with the denoiser")
    shard: int = _option(2048, "scenes per shard of encoded training data")
    first_shards: int = _option(4, "shards encoded before the first step")
    shard_every: int = _option(120, "steps between two new shards")
    most_shards: int = _option(32, "shards in all")
    save_every: float = _option(300.0, "seconds between checkpoints")
    bfloat16: bool = _option(True, "compute in bfloat16; masters stay float32")
    threads: int = _option(2, "CPU threads")
    seed: int = _option(0, "seed of weights, data and noise")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps and batch must be at least 1, got {self.steps}, {self.batch}")


# --- stages that are done once -----------------------------------------------------------------


def stage(path: Path, module: Any, work: Callable[[], None]) -> None:
    """Load `module` from `path`, or do `work` on it and leave it there."""
    from safetensors.torch import load_file, save_file

    if not path.exists() and rank() == 0:
        work()
        partial = path.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, partial)
        partial.replace(path)
    wait()
    module.load_state_dict(load_file(path))


def build(arch: Architecture, seed: int) -> tuple[Any, Any, Any]:
    """VAE, text encoder and UNet with the weights of `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_vae(arch), build_text_encoder(arch), build_unet(arch)


def latent_scaling(out: Path, vae: Any) -> float:
    """One over the deviation of latents, measured once and kept in `out`."""
    path = out / "scaling.json"
    if not path.exists() and rank() == 0:
        latents = encode(vae, images(scenes("train", 256), 0), 1.0)
        path.write_text(json.dumps(round(1 / float(latents.std()), 3)))
    wait()
    return float(json.loads(path.read_text()))


# --- the denoiser ------------------------------------------------------------------------------


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains it: inner convolutions and linear layers of the UNet."""
    outer = ("conv_in", "conv_out", "time_embedding", "time_emb_proj")
    inner = name.startswith("unet.") and parameter.ndim >= 2
    return inner and not any(word in name for word in outer)


class Trainer:
    """The denoiser's training, resumable at any step."""

    def __init__(self, config: TrainConfig, arch: Architecture) -> None:
        self.config = config
        config.out.mkdir(parents=True, exist_ok=True)
        vae, text_encoder, unet = build(arch, config.seed)
        vae.to(memory_format=torch.channels_last)
        unet.to(memory_format=torch.channels_last)
        stage(config.out / "vae.safetensors", vae, lambda: train_vae(vae, config.vae_steps, 0))
        stage(
            config.out / "text.safetensors",
            text_encoder,
            lambda: train_text(text_encoder, config.text_steps, config.seed),
        )
        self.vae, self.text_encoder, self.unet = vae.eval(), text_encoder, unet
        self.scaling = latent_scaling(config.out, self.vae)
        self.nets = nn.ModuleDict({"unet": unet, "text": text_encoder})
        self.optimizer = Optimizer(dict(self.nets.named_parameters()), is_matrix, Rates())
        self.progress = Progress()
        self.path = config.out / "state.safetensors"
        if self.path.exists():
            state, self.progress = load_state(self.path)
            self.optimizer.restore(state)

    def run(self, stop: int | None = None) -> None:
        """Train to the end, or as if killed after step `stop`."""
        denoising, pool = self._prepare(), self._pool()
        started, saved, done = time.monotonic(), time.monotonic(), self.progress.seconds
        while (share := self._share()) < 1 and (stop is None or self.progress.step < stop):
            loss, norm = self._step(denoising, pool, share)
            now = time.monotonic()
            self.progress.seconds = agree(done + now - started)
            if self.progress.step % 20 == 0 and rank() == 0:
                self._log(loss, norm, share)
            if now - saved > self.config.save_every:
                self._save()
                saved = now
        self._save()

    def _save(self) -> None:
        if rank() == 0:
            save_state(self.path, self.optimizer.state(), self.progress)

    def _share(self) -> float:
        limits = [self.progress.step / self.config.steps]
        if self.config.minutes:
            limits.append(self.progress.seconds / 60 / self.config.minutes)
        return max(limits)

    def _prepare(self) -> Denoising:
        if self.config.bfloat16:
            self.nets.to(torch.bfloat16)
        self.unet.set_attn_processor(PlainAttention())
        return Denoising(self.unet, self.text_encoder, build_scheduler().alphas_cumprod)

    def _pool(self) -> Pool:
        c = self.config
        return Pool(
            c.out / "shards",
            self.vae,
            self.scaling,
            size=c.shard,
            first=c.first_shards,
            every=c.shard_every,
            most=c.most_shards,
        )

    def _step(self, denoising: Denoising, pool: Pool, share: float) -> tuple[float, float]:
        step = self.progress.step
        generator = torch.Generator().manual_seed((self.config.seed << 32) + step)
        loss = denoising.loss(pool.batch(step, self.config.batch, generator), generator)
        self.nets.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.nets.parameters())
        rate = min(1.0, (step + 1) / 50, (1 - share) / self.config.decay)
        norm = self.optimizer.step(step + 1, rate, min(0.998, (1 + step) / (10 + step)))
        self.progress.step += 1
        self.progress.samples += self.config.batch
        return float(loss.detach()), norm

    def _log(self, loss: float, norm: float, share: float) -> None:
        p = self.progress
        log.info(
            "step %d samples %d minutes %.1f share %.3f loss %.4f norm %.2f",
            *(p.step, p.samples, p.seconds / 60, share, loss, norm),
        )


def parse_config(arguments: list[str] | None = None) -> TrainConfig:
    """The command line: one option for each field of `TrainConfig`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for f in fields(TrainConfig):
        flag, default = "--" + f.name.replace("_", "-"), f.default
        text = f"{f.metadata['help']} (default: {default})"
        if isinstance(default, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=default, help=text)
        else:
            parser.add_argument(flag, type=type(default), default=default, help=text)
    return TrainConfig(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Train, or continue training, as the command line says."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = parse_config()
    torch.set_num_threads(config.threads)
    join_group()
    Trainer(config, Architecture()).run()
    leave_group()


if __name__ == "__main__":
    main()
