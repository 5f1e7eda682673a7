"""Training data of the reference pipeline: scenes encoded to latents, shard by shard."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimdiff.reference.captions import caption, scenes
from slimdiff.reference.parallel import rank, wait
from slimdiff.reference.scenes import POSITIONS, Scene, render_batch
from slimdiff.reference.tokenizer import LENGTH, tokenizer


@dataclass(frozen=True)
class Shard:
    """`n` encoded scenes."""

    latents: Tensor
    """(n, 4, 16, 16), float16, scaled to unit deviation."""
    tokens: Tensor
    """(n, 20), int64."""
    occupied: Tensor
    """(n, 4), bool: which of the four positions hold an object."""


def tokenize(captions: list[str]) -> Tensor:
    """Token ids (n, 20), padded as the pipeline pads them."""
    encoded = tokenizer()(captions, padding="max_length", max_length=LENGTH, truncation=True)
    return torch.tensor(encoded["input_ids"])


def images(batch: list[Scene], seed: int) -> Tensor:
    """Rendered scenes (n, 3, 64, 64), from -1 to 1."""
    rendered = render_batch(batch, np.random.default_rng([seed, len(batch)]))
    return torch.from_numpy(rendered).permute(0, 3, 1, 2).mul(2).sub(1).contiguous()


def occupied(batch: list[Scene]) -> Tensor:
    """Which positions hold an object: (n, 4), bool."""
    taken = [[p in {o.position for o in s.objects} for p in POSITIONS] for s in batch]
    return torch.tensor(taken)


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, scaling: float, chunk: int = 64) -> Tensor:
    """Scaled latent means of `pixels`: (n, 4, 16, 16), float32."""
    parts = []
    for part in pixels.split(chunk):
        with torch.autocast("cpu", torch.bfloat16, enabled=len(pixels) >= chunk):
            part = part.contiguous(memory_format=torch.channels_last)
            parts.append(vae.encode(part).latent_dist.mean.float() * scaling)
    return torch.cat(parts)


def make_shard(vae: Any, scaling: float, size: int, seed: int) -> Shard:
    """Draw, render and encode `size` scenes of the training split."""
    batch = scenes("train", size, seed)
    latents = encode(vae, images(batch, seed), scaling).half().contiguous()
    return Shard(latents, tokenize([caption(s) for s in batch]), occupied(batch))


def cached_shard(folder: Path, vae: Any, scaling: float, size: int, seed: int) -> Shard:
    """The shard of `seed`, from `folder` when an earlier run left it there."""
    from safetensors.torch import load_file, save_file

    path = folder / f"shard-{seed:04d}.safetensors"
    if not path.exists() and rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(vars(make_shard(vae, scaling, size, seed)), partial)
        os.replace(partial, path)
    wait()
    return Shard(**load_file(path))


class Pool:
    """The shards in use; which ones depends only on the step, so that a resumed run agrees."""

    def __init__(
        self,
        folder: Path,
        vae: Any,
        scaling: float,
        *,
        size: int,
        first: int,
        every: int,
        most: int,
    ) -> None:
        self.make = lambda seed: cached_shard(folder, vae, scaling, size, seed)
        self.first, self.every, self.most = first, every, most
        self.shards: list[Shard] = []

    def batch(self, step: int, n: int, generator: torch.Generator) -> Shard:
        """`n` scenes drawn with replacement from the shards in use at `step`."""
        in_use = min(self.first + step // self.every, self.most)
        while len(self.shards) < in_use:
            self.shards.append(self.make(len(self.shards)))
        size = len(self.shards[0].tokens)
        picks = torch.randint(in_use * size, (n,), generator=generator)
        chosen = [(self.shards[i // size], i % size) for i in picks.tolist()]
        names = vars(self.shards[0])
        return Shard(*(torch.stack([getattr(s, f)[i] for s, i in chosen]) for f in names))
