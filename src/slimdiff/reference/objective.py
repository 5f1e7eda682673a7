"""What a denoiser is trained on: noisy latents, their timesteps, and a weighted error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimdiff.reference.data import Shard
from slimdiff.reference.parallel import rank, world_size

TIMESTEPS = 1000


def draw_timesteps(n: int, generator: torch.Generator) -> Tensor:
    """Stratified timesteps (n,), most of them where layout and shape are decided."""
    drawn: dict[str, Any] = {"generator": generator, "device": generator.device}
    shares = (torch.arange(n, device=generator.device) + torch.rand(n, **drawn)) / n
    shares = shares[torch.randperm(n, **drawn)].clamp(1e-4, 1 - 1e-4)
    logistic = torch.sigmoid(0.3 + 1.1 * torch.special.ndtri(shares))
    uniform = torch.rand(n, **drawn)
    mixed = torch.where(torch.rand(n, **drawn) < 0.85, logistic, uniform)
    return (mixed * TIMESTEPS).long().clamp(0, TIMESTEPS - 1)


def loss_weights(occupied: Tensor, emphasis: float = 3.0) -> Tensor:
    """Weights (n, 1, 16, 16) of mean 1: quadrants with an object count `emphasis` times."""
    quadrants = 1 + (emphasis - 1) * occupied.float().unflatten(1, (2, 2))
    quadrants = quadrants / quadrants.mean((1, 2), keepdim=True)
    return quadrants.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]


@dataclass
class Denoising:
    """One training step's forward pass, whichever the noise and the networks.

    Everything is drawn, and computed, on the device of the generator.

    Attributes:
        corrupt: (clean, noise, steps) to (noisy, target), all but steps (n,) of latents' shape.
        predict: (noisy, steps, tokens, generator) to a guess of the target.
        blank: tokens (1, length) of the empty caption.
        dropout: share of captions that are blanked, for guidance.
    """

    corrupt: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    predict: Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]
    blank: Tensor
    dropout: float = 0.1

    def loss(self, batch: Shard, generator: torch.Generator) -> Tensor:
        """Weighted squared error of the prediction on `batch`."""
        n = len(batch.tokens)
        part = slice(rank(), None, world_size())  # of a batch that all processes draw alike
        clean = batch.latents.float()
        drawn: dict[str, Any] = {"generator": generator, "device": generator.device}
        noise = torch.randn(clean.shape, **drawn)
        steps = draw_timesteps(n, generator)
        noisy, target = self.corrupt(clean, noise, steps)
        dropped = torch.rand(n, **drawn) < self.dropout
        tokens = torch.where(dropped[:, None], self.blank, batch.tokens)
        guess = self.predict(noisy[part], steps[part], tokens[part], generator).float()
        return ((guess - target[part]).square() * loss_weights(batch.occupied)[part]).mean()
