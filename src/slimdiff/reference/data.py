"""Training data of a reference: pictures of its world encoded to latents, shard by shard."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimdiff.reference.parallel import rank, wait
from slimdiff.reference.world import World
from slimdiff.reference.worlds import SCENES


@dataclass(frozen=True)
class Shard:
    """`n` encoded pictures."""

    latents: Tensor
    """(n, c, 16, 16), float16, scaled to unit deviation."""
    tokens: Tensor
    """(n, length), int64."""
    occupied: Tensor
    """(n, 4), bool: which quadrants count for more."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Shard:
        """Every tensor changed alike."""
        return Shard(change(self.latents), change(self.tokens), change(self.occupied))


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, scaling: float, chunk: int = 64) -> Tensor:
    """Scaled latent means of `pixels`: (n, c, 16, 16), float32."""
    parts, kind = [], vae.device.type
    for part in pixels.split(chunk):
        with torch.autocast(kind, torch.bfloat16, enabled=len(pixels) >= chunk):
            part = part.to(vae.device).contiguous(memory_format=torch.channels_last)
            parts.append(vae.encode(part).latent_dist.mean.float() * scaling)
    return torch.cat(parts)


def make_shard(vae: Any, scaling: float, size: int, seed: int, world: World = SCENES) -> Shard:
    """Draw and encode `size` pictures of the training split."""
    drawn = world.draw("train", size, seed)
    latents = encode(vae, drawn.pixels, scaling).half().cpu().contiguous()
    return Shard(latents, world.tokenize(drawn.captions), drawn.occupied)


def cached_shard(
    folder: Path, vae: Any, scaling: float, size: int, seed: int, world: World = SCENES
) -> Shard:
    """The shard of `seed`, from `folder` when an earlier run left it there."""
    from safetensors.torch import load_file, save_file

    path = folder / f"shard-{seed:04d}.safetensors"
    if not path.exists() and rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(vars(make_shard(vae, scaling, size, seed, world)), partial)
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
        world: World = SCENES,
        *,
        size: int,
        first: int,
        every: int,
        most: int,
    ) -> None:
        self.make = lambda seed: cached_shard(folder, vae, scaling, size, seed, world)
        self.size, self.first, self.every, self.most = size, first, every, most
        self.device = vae.device
        self.shards, self.data = 0, Shard(*[torch.empty(0)] * 3)

    def batch(self, step: int, n: int, generator: torch.Generator) -> Shard:
        """`n` pictures drawn with replacement from the shards in use at `step`."""
        in_use = min(self.first + step // self.every, self.most)
        while self.shards < in_use:
            self._add(self.make(self.shards))
        picks = torch.randint(in_use * self.size, (n,), generator=generator, device=self.device)
        return self.data.map(lambda rows: rows[picks])

    def _add(self, shard: Shard) -> None:
        made = shard.map(lambda rows: rows.to(self.device))
        pairs = zip(vars(self.data).values(), vars(made).values())
        self.data = Shard(*map(torch.cat, pairs)) if self.shards else made
        self.shards += 1
