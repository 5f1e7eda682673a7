"""The short stage before the others: the autoencoder."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from slimdiff.reference.data import encode
from slimdiff.reference.optim import Optimizer, Rates, warm_and_decay
from slimdiff.reference.world import World

log = logging.getLogger(__name__)


def train_vae(vae: Any, world: World, steps: int, seed: int, *, batch: int = 16) -> None:
    """Train `vae` in place: first on crops of 32 pixels (cheap), then on whole images."""
    generator = torch.Generator(vae.device).manual_seed(seed)
    pixels = world.draw("train", min(4096, steps * batch), seed).pixels.to(vae.device)
    channels = vae.config.latent_channels
    with torch.no_grad():  # begin with little noise in the latents
        vae.quant_conv.bias[channels:] = -4
        vae.quant_conv.weight[channels:] *= 0.1
    rates = Rates(muon=4e-3, adam=1.5e-3, weight_decay=0.0)
    optimizer = Optimizer(dict(vae.named_parameters()), _is_inner_conv, rates)
    for step in range(steps):
        crop = step < 0.75 * steps
        x = _draw(pixels, batch if crop else batch // 2, crop, generator)
        loss = _vae_loss(vae, x, generator)
        vae.zero_grad()
        loss.backward()
        optimizer.step(step + 1, warm_and_decay(step, steps), 0.0)
        if step % 100 == 0:
            log.info("vae step %d of %d: loss %.4f", step, steps, float(loss.detach()))
    standardise(vae, pixels[:256])


@torch.no_grad()
def standardise(vae: Any, pixels: Tensor) -> None:
    """Fold each latent channel's mean and deviation into the convolutions around it."""
    latents = encode(vae, pixels, 1.0)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    inner, outer = vae.quant_conv, vae.post_quant_conv
    outer.bias += torch.einsum("oi,i->o", outer.weight[:, :, 0, 0], mean)
    outer.weight *= deviation[None, :, None, None]
    inner.bias[: len(mean)] = (inner.bias[: len(mean)] - mean) / deviation
    inner.bias[len(mean) :] -= 2 * deviation.log()
    inner.weight[: len(mean)] /= deviation[:, None, None, None]


def _is_inner_conv(name: str, parameter: Tensor) -> bool:
    outer = ("conv_in", "conv_out", "quant")
    return parameter.ndim == 4 and not any(word in name for word in outer)


def _draw(pixels: Tensor, n: int, crop: bool, generator: torch.Generator) -> Tensor:
    """`n` whole images or crops of 32 pixels, at a place that all share."""
    device = generator.device
    x = pixels[torch.randint(len(pixels), (n,), generator=generator, device=device)]
    if crop:
        top, left = (4 * torch.randint(9, (2,), generator=generator, device=device)).tolist()
        x = x[:, :, top : top + 32, left : left + 32]
    return x.contiguous(memory_format=torch.channels_last)


def _vae_loss(vae: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        latent = vae.encode(x).latent_dist
        mean, logvar = latent.mean.float(), latent.logvar.float()
        noise = torch.randn(mean.shape, generator=generator, device=x.device)
        error = vae.decode(mean + noise * (0.5 * logvar).exp()).sample.float() - x
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 4 * error.square().mean() + 1e-4 * divergence
