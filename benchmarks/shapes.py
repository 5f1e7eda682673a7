"""The published configurations of Stable Diffusion's UNets, and inputs for one forward of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"

SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD21: dict[str, Any] = SD15 | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Shape:
    """A UNet's configuration, and how it is run on a machine without a GPU."""

    config: dict[str, Any]
    dtype: torch.dtype
    latents: int


SHAPES = {
    "sd15": Shape(SD15, torch.float32, 64),
    "sd21": Shape(SD21, torch.float32, 64),
    "sdxl": Shape(SDXL, torch.bfloat16, 32),
}


def build(shape: Shape, seed: int = 0) -> Any:
    """The UNet with random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        return UNet2DConditionModel(**shape.config).eval()
    finally:
        torch.set_default_dtype(before)


def inputs(shape: Shape, seed: int) -> dict[str, Any]:
    """Keyword arguments of one forward, batch 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(shape.dtype)

    call: dict[str, Any] = {
        "sample": normal(1, 4, shape.latents, shape.latents),
        "timestep": torch.tensor(999 - 400 * (seed % 2)),
        "encoder_hidden_states": normal(1, 77, shape.config["cross_attention_dim"]),
    }
    if "addition_embed_type" in shape.config:
        side = float(8 * shape.latents)
        ids = torch.tensor([[side, side, 0.0, 0.0, side, side]], dtype=shape.dtype)
        call["added_cond_kwargs"] = {"text_embeds": normal(1, 1280), "time_ids": ids}
    return call
