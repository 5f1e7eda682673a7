"""What the denoiser is trained on: noisy latents, their timesteps, and a weighted error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimdiff.reference.data import Shard, tokenize
from slimdiff.reference.parallel import rank, world_size


class PlainAttention:
    """Attention by explicit products: on CPU its backward is faster than the fused kernel's."""

    def __call__(
        self,
        attn: Any,
        x: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        """Tokens (n, t, c) to tokens (n, t, c)."""
        context = x if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(x))
        key = attn.head_to_batch_dim(attn.to_k(context))
        value = attn.head_to_batch_dim(attn.to_v(context))
        shares = (torch.bmm(query * attn.scale, key.mT)).softmax(-1)
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(shares, value)))


def draw_timesteps(n: int, generator: torch.Generator) -> Tensor:
    """Stratified timesteps (n,), most of them where layout and shape are decided."""
    shares = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    shares = shares[torch.randperm(n, generator=generator)].clamp(1e-4, 1 - 1e-4)
    logistic = torch.sigmoid(0.3 + 1.1 * torch.special.ndtri(shares))
    uniform = torch.rand(n, generator=generator)
    mixed = torch.where(torch.rand(n, generator=generator) < 0.85, logistic, uniform)
    return (mixed * 1000).long().clamp(0, 999)


def loss_weights(occupied: Tensor, emphasis: float = 3.0) -> Tensor:
    """Weights (n, 1, 16, 16) of mean 1: quadrants with an object count `emphasis` times."""
    quadrants = 1 + (emphasis - 1) * occupied.float().unflatten(1, (2, 2))
    quadrants = quadrants / quadrants.mean((1, 2), keepdim=True)
    return quadrants.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]


@dataclass
class Denoising:
    """One training step's forward pass."""

    unet: Any
    text_encoder: Any
    alphas: Tensor
    """Cumulative signal shares by timestep, (1000,)."""
    dropout: float = 0.1

    def loss(self, batch: Shard, generator: torch.Generator) -> Tensor:
        """Weighted v-prediction error on `batch`."""
        n, dtype = len(batch.tokens), next(self.text_encoder.parameters()).dtype
        part = slice(rank(), None, world_size())  # of a batch that all processes draw alike
        clean = batch.latents.float()
        noise = torch.randn(clean.shape, generator=generator)
        steps = draw_timesteps(n, generator)
        signal = self.alphas[steps, None, None, None]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        target = signal.sqrt() * noise - (1 - signal).sqrt() * clean
        blank = torch.rand(n, generator=generator) < self.dropout
        tokens = torch.where(blank[:, None], tokenize([""]), batch.tokens)
        states = self.text_encoder(tokens[part]).last_hidden_state
        noisy = noisy[part].to(dtype).contiguous(memory_format=torch.channels_last)
        guess = self.unet(noisy, steps[part], states, return_dict=False)[0].float()
        return ((guess - target[part]).square() * loss_weights(batch.occupied)[part]).mean()
