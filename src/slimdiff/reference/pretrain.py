"""The two short stages before the denoiser: the autoencoder and the text encoder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.reference.captions import caption, scenes
from slimdiff.reference.data import encode, images, tokenize
from slimdiff.reference.optim import Optimizer, Rates
from slimdiff.reference.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Scene

log = logging.getLogger(__name__)

VOCABULARIES: tuple[tuple[str, ...], ...] = (tuple(SIZES), tuple(COLOURS), SHAPES)


def warm_and_decay(step: int, steps: int, warmup: int = 30, decay: float = 0.6) -> float:
    """Share of the base learning rate: linear up, flat, linear down over the last `decay`."""
    return min(1.0, (step + 1) / warmup, (1 - step / steps) / decay)


# --- autoencoder -----------------------------------------------------------------------------


def train_vae(vae: Any, steps: int, seed: int, *, batch: int = 16) -> None:
    """Train `vae` in place: first on crops of 32 pixels (cheap), then on whole images."""
    generator = torch.Generator().manual_seed(seed)
    pixels = images(scenes("train", min(4096, steps * batch), seed), seed)
    with torch.no_grad():  # begin with little noise in the latents
        vae.quant_conv.bias[4:] = -4
        vae.quant_conv.weight[4:] *= 0.1
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
    x = pixels[torch.randint(len(pixels), (n,), generator=generator)]
    if crop:
        top, left = (4 * torch.randint(9, (2,), generator=generator)).tolist()
        x = x[:, :, top : top + 32, left : left + 32]
    return x.contiguous(memory_format=torch.channels_last)


def _vae_loss(vae: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        latent = vae.encode(x).latent_dist
        mean, logvar = latent.mean.float(), latent.logvar.float()
        noise = torch.randn(mean.shape, generator=generator)
        error = vae.decode(mean + noise * (0.5 * logvar).exp()).sample.float() - x
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 4 * error.square().mean() + 1e-4 * divergence


# --- text encoder ----------------------------------------------------------------------------


class Reader(nn.Module):
    """Reads the scene off the text encoder's states; a training aid, not kept.

    At the last word of each object: its size, colour, shape and position. At the end token:
    the background, and for each position the object there, or none.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        counts = [len(v) for v in VOCABULARIES]
        self.object_counts = [*counts, len(POSITIONS)]
        self.scene_counts = [len(BACKGROUNDS), *(c + 1 for _ in POSITIONS for c in counts)]
        self.of_object = nn.Linear(width, sum(self.object_counts))
        self.of_scene = nn.Linear(width, sum(self.scene_counts))

    def loss(self, states: Tensor, batch: list[Scene]) -> Tensor:
        """Mean cross-entropy of all readings from `states` (n, 20, width)."""
        rows, columns, labels = _object_labels(batch)
        own = self.of_object(states[rows, columns]).split(self.object_counts, -1)
        ends = torch.tensor([1 + len(caption(s).split()) for s in batch])
        whole = self.of_scene(states[torch.arange(len(batch)), ends]).split(self.scene_counts, -1)
        pairs = [*zip(own, labels.T), *zip(whole, _scene_labels(batch).T)]
        return torch.stack([nn.functional.cross_entropy(p, y) for p, y in pairs]).mean()


def _object_labels(batch: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Image row, token column and the four labels of every object."""
    rows, columns, labels = [], [], []
    for i, scene in enumerate(batch):
        for k, o in enumerate(scene.objects):
            rows.append(i)
            columns.append(6 + 7 * k)  # start token, then six words to an object and "and"
            words = (o.size, o.colour, o.shape)
            own = [v.index(w) for v, w in zip(VOCABULARIES, words)]
            labels.append([*own, tuple(POSITIONS).index(o.position)])
    return torch.tensor(rows), torch.tensor(columns), torch.tensor(labels)


def _scene_labels(batch: list[Scene]) -> Tensor:
    """Background, then size, colour and shape at each position, 0 for none: (n, 13)."""
    labels = []
    for scene in batch:
        by_place = {o.position: (o.size, o.colour, o.shape) for o in scene.objects}
        row = [tuple(BACKGROUNDS).index(scene.background)]
        for place in POSITIONS:
            words = by_place.get(place, (None,) * len(VOCABULARIES))
            row += [v.index(w) + 1 if w else 0 for v, w in zip(VOCABULARIES, words)]
        labels.append(row)
    return torch.tensor(labels)


def train_text(
    text: nn.Module,
    states_of: Callable[[nn.Module, Tensor], Tensor],
    steps: int,
    seed: int,
    *,
    batch: int = 128,
) -> None:
    """Teach `text` to bind words to objects, which CLIP brings along and it does not.

    What is read are `states_of(text, tokens)`, (batch, 20, width).
    """
    generator = torch.Generator().manual_seed(seed)
    pool = scenes("train", min(20_000, steps * batch), seed + 1)
    tokens = tokenize([caption(s) for s in pool])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = Reader(states_of(text, tokens[:1]).shape[-1])
    parameters = {**dict(text.named_parameters()), **dict(reader.named_parameters())}
    optimizer = Optimizer(parameters, _is_inner_linear, Rates(muon=2e-3, adam=2e-3))
    for step in range(steps):
        picks = torch.randint(len(pool), (batch,), generator=generator)
        loss = reader.loss(states_of(text, tokens[picks]), [pool[i] for i in picks])
        text.zero_grad()
        reader.zero_grad()
        loss.backward()
        optimizer.step(step + 1, warm_and_decay(step, steps), 0.0)
        if step % 100 == 0:
            log.info("text step %d of %d: loss %.4f", step, steps, float(loss.detach()))


def _is_inner_linear(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and ".layers." in name
