"""The published configurations of models that are run, and inputs for one forward of each."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from slimdiff.families import FAMILIES
from slimdiff.groups import Given

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


SD3: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
PIXART: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 128,
    "caption_channels": 4096,
    "use_additional_conditions": False,
}


@dataclass(frozen=True)
class Shape:
    """A denoiser's configuration, and how it is run on a machine without a GPU."""

    config: dict[str, Any]
    dtype: torch.dtype
    latents: int
    denoiser: str = "UNet2DConditionModel"


SHAPES = {
    "sd15": Shape(SD15, torch.float32, 64),
    "sd21": Shape(SD21, torch.float32, 64),
    "sdxl": Shape(SDXL, torch.bfloat16, 32),
    "sd3-medium": Shape(SD3, torch.bfloat16, 64, "SD3Transformer2DModel"),
    "pixart-sigma": Shape(PIXART, torch.bfloat16, 64, "PixArtTransformer2DModel"),
}


def build(shape: Shape, seed: int = 0) -> Any:
    """The denoiser with random weights."""
    import diffusers

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        return getattr(diffusers, shape.denoiser)(**shape.config).eval()
    finally:
        torch.set_default_dtype(before)


def _defaults(denoiser: str) -> dict[str, Any]:
    """What a configuration that leaves a setting out means by it."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, denoiser).__init__).parameters
    return {name: given.default for name, given in parameters.items() if name != "self"}


def inputs(shape: Shape, seed: int) -> dict[str, Any]:
    """Keyword arguments of one forward, batch 1: random, but for the timestep and the size."""
    generator = torch.Generator().manual_seed(seed)

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(part) for name, part in value.items()}
        if isinstance(value, Given):
            return value.value
        return torch.randn(value, generator=generator).to(shape.dtype)

    config = _defaults(shape.denoiser) | shape.config | {"sample_size": shape.latents}
    sizes = FAMILIES[shape.denoiser].inputs(config)
    call = filled(sizes) | {"timestep": torch.tensor([999 - 400 * (seed % 2)])}
    if "time_ids" in call.get("added_cond_kwargs", {}):
        side = float(8 * shape.latents)
        ids = torch.tensor([[side, side, 0.0, 0.0, side, side]], dtype=shape.dtype)
        call["added_cond_kwargs"]["time_ids"] = ids
    return call
