"""Train a reference pipeline: `python -m slimdiff.reference.train --reference scenes-unet`.

Three stages: autoencoder, text encoder (both minutes), then the denoiser together with the text
encoder. Every stage leaves its result in `out`; a second call continues where the first stopped,
and gives the weights that an uninterrupted call would have given. On a machine that does other
work too, `slimdiff.reference.parallel` says how to start it.

A bundled reference is trained on, for eight minutes on a GPU, by

    python -m slimdiff.reference.train --reference emoji-unet --start-from emoji-unet --compile \\
        --minutes 8 --steps 100000 --batch 768 --rate 0.5 --decay 0.8 --shard 32768 --most-shards 6
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.reference.bundled import REFERENCES
from slimdiff.reference.contract import Reference
from slimdiff.reference.data import Pool
from slimdiff.reference.objective import Denoising
from slimdiff.reference.optim import Optimizer
from slimdiff.reference.parallel import agree, average_gradients, join_group, leave_group, rank
from slimdiff.reference.pretrain import train_vae
from slimdiff.reference.references import TRAINABLE, reference, with_pictures
from slimdiff.reference.stages import (
    build,
    device_named,
    latent_scaling,
    stage,
    start_from,
    starting_state,
    take_vae,
)
from slimdiff.reference.state import Progress, load_state, save_state

log = logging.getLogger(__name__)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train."""

    reference: str = _option("scenes-unet", "what to train: " + ", ".join(TRAINABLE))
    out: Path = _option(Path(), "folder of checkpoints; runs/REFERENCE if none is given")
    steps: int = _option(1050, "denoiser steps in all")
    minutes: float = _option(0.0, "if not 0, end the denoiser's training after so many minutes")
    decay: float = _option(0.4, "share of training over which the rate falls to 0 at the end")
    rate: float = _option(1.0, "share of the usual learning rates")
    batch: int = _option(64, "pictures per step")
    vae_from: str = _option("", "take over a bundled reference's autoencoder, train none")
    start_from: str = _option(
        "",
        "take over the averaged weights of a training folder, or those of a bundled reference",
    )
    pictures: str = _option("", "folder of the world's pictures, if not those that are bundled")
    vae_steps: int = _option(1100, "autoencoder steps")
    text_steps: int = _option(250, "text encoder steps before it is trained with the denoiser")
    shard: int = _option(2048, "pictures per shard of encoded training data")
    first_shards: int = _option(4, "shards encoded before the first step")
    shard_every: int = _option(120, "steps between two new shards")
    most_shards: int = _option(32, "shards in all")
    save_every: float = _option(300.0, "seconds between checkpoints")
    device: str = _option("auto", "cpu, cuda, ...; auto takes an accelerator where there is one")
    compile: bool = _option(False, "compile the denoiser with torch.compile")
    bfloat16: bool = _option(True, "compute in bfloat16; masters stay float32")
    threads: int = _option(2, "CPU threads")
    seed: int = _option(0, "seed of weights, data and noise")

    def __post_init__(self) -> None:
        if not self.out.parts:
            object.__setattr__(self, "out", Path("runs") / self.reference)
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps and batch must be at least 1, got {self.steps}, {self.batch}")


class Trainer:
    """The denoiser's training, resumable at any step."""

    def __init__(self, config: TrainConfig, kind: Reference) -> None:
        self.config, self.kind = config, with_pictures(kind, config.pictures)
        self.device = device_named(config.device)
        config.out.mkdir(parents=True, exist_ok=True)
        self.vae, networks = build(kind, config.seed, self.device)
        self.networks = nn.ModuleDict(networks)
        stage(config.out / "vae.safetensors", self.vae, self._train_vae)
        stage(config.out / "text.safetensors", networks["text"], self._train_text)
        self.vae.eval()
        self.scaling = latent_scaling(config.out, self.vae, self.kind.world)
        self.progress = Progress()
        self.path = config.out / "state.safetensors"
        if config.start_from and not self.path.exists():
            self._start()
        parameters = dict(self.networks.named_parameters())
        self.optimizer = Optimizer(parameters, kind.is_matrix, kind.rates)
        if self.path.exists():
            state, self.progress = load_state(self.path)
            self.optimizer.restore(state)

    def _train_vae(self) -> None:
        c = self.config
        if source := c.vae_from or (c.start_from if c.start_from in REFERENCES else ""):
            take_vae(self.vae, source)
        else:
            train_vae(self.vae, self.kind.world, c.vae_steps, 0)

    def _train_text(self) -> None:
        teach, c = self.kind.world.teach, self.config
        if teach and not c.start_from:  # which brings a text encoder along
            teach(self.networks["text"], self.kind.states, c.text_steps, c.seed)

    def _start(self) -> None:
        networks = dict(self.networks.items())
        state = starting_state(self.config.start_from, self.kind)
        start_from(state, networks, self._first_loss)

    def _first_loss(self) -> Tensor:
        generator = self._generator(self.config.seed)
        denoising = self.kind.denoising(dict(self.networks.items()))
        batch = self._pool().batch(0, self.config.batch, generator)
        return denoising.loss(batch, generator)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

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
            self.networks.to(torch.bfloat16)
        if self.config.compile:
            self.networks[self.kind.denoiser].compile()
        return self.kind.denoising(dict(self.networks.items()))

    def _pool(self) -> Pool:
        c = self.config
        return Pool(
            c.out / "shards",
            self.vae,
            self.scaling,
            self.kind.world,
            size=c.shard,
            first=c.first_shards,
            every=c.shard_every,
            most=c.most_shards,
        )

    def _step(self, denoising: Denoising, pool: Pool, share: float) -> tuple[Tensor, Tensor]:
        step = self.progress.step
        generator = self._generator((self.config.seed << 32) + step)
        loss = denoising.loss(pool.batch(step, self.config.batch, generator), generator)
        self.networks.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.networks.parameters())
        rate = self.config.rate * min(1.0, (step + 1) / 50, (1 - share) / self.config.decay)
        norm = self.optimizer.step(step + 1, rate, min(0.998, (1 + step) / (10 + step)))
        self.progress.step += 1
        self.progress.samples += self.config.batch
        return loss.detach(), norm

    def _log(self, loss: Tensor, norm: Tensor, share: float) -> None:
        p = self.progress
        log.info(
            "step %d samples %d minutes %.1f share %.3f loss %.4f norm %.2f",
            *(p.step, p.samples, p.seconds / 60, share, float(loss), float(norm)),
        )


def parse_config(arguments: list[str] | None = None) -> TrainConfig:
    """The command line: one option for each field of `TrainConfig`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for f in fields(TrainConfig):
        flag, default = "--" + f.name.replace("_", "-"), f.default
        shown = "" if default in ("", Path()) else f" (default: {default})"
        text = f.metadata["help"] + shown
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
    Trainer(config, reference(config.reference)).run()
    leave_group()


if __name__ == "__main__":
    main()
