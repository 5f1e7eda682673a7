"""Parts that every reference pipeline is built from, untrained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slimdiff.reference.optim import Rates
from slimdiff.reference.pixels import SIDE
from slimdiff.reference.world import World
from slimdiff.reference.worlds import SCENES

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig

LATENT_SIDE = SIDE // 4


@dataclass(frozen=True)
class Architecture:
    """What is drawn, widths of the autoencoder and of the text encoder, and learning rates."""

    world: World = SCENES
    latent_channels: int = 4
    vae_channels: tuple[int, int, int] = (32, 64, 64)
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    norm_groups: int = 32
    rates: Rates = Rates()


def build_vae(arch: Architecture) -> AutoencoderKL:
    """Images (n, 3, 64, 64) from -1 to 1 to latents (n, c, 16, 16)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=arch.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=arch.latent_channels,
        norm_num_groups=min(arch.norm_groups, 16),
        mid_block_add_attention=False,
        sample_size=SIDE,
    )


def text_config(world: World, width: int, layers: int, heads: int) -> CLIPTextConfig:
    """Configuration of a CLIP text encoder: tokens (n, length) to (n, length, width)."""
    from transformers import CLIPTextConfig

    tokens = world.tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=world.length,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def parameters_of(network: Any) -> float:
    """Millions of parameters."""
    return sum(p.numel() for p in network.parameters()) / 1e6


def device_of(networks: Mapping[str, nn.Module]) -> torch.device:
    """Where networks are."""
    return next(p.device for network in networks.values() for p in network.parameters())
