"""One tiny random denoiser for every shape of model that slimdiff knows. The contract suite runs
on each; a new family adds one function here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Inputs = list[dict[str, Any]]


def _unet(**changes: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**(config | changes)).eval()


def _inputs(channels: int = 24, **added: Any) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def call(step: int) -> dict[str, Any]:
        return {
            "sample": torch.randn(2, 4, 8, 8, generator=generator),
            "timestep": torch.tensor(900 - 200 * step),
            "encoder_hidden_states": torch.randn(2, 7, channels, generator=generator),
        } | {name: make(generator) for name, make in added.items()}

    return [call(step) for step in range(4)]


def sd1() -> tuple[nn.Module, Inputs]:
    """Convolutional projections around the blocks, two heads."""
    return _unet(), _inputs()


def sd2() -> tuple[nn.Module, Inputs]:
    """Linear projections, heads of equal width, attention computed in float32."""
    heads = {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True}
    return _unet(**heads), _inputs()


def sdxl() -> tuple[nn.Module, Inputs]:
    """Several transformer blocks in a row and added text and time conditioning."""
    model = _unet(
        use_linear_projection=True,
        transformer_layers_per_block=(2, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )

    def added(generator: torch.Generator) -> dict[str, Any]:
        return {
            "text_embeds": torch.randn(2, 16, generator=generator),
            "time_ids": torch.rand(2, 6, generator=generator),
        }

    return model, _inputs(added_cond_kwargs=added)


def cross_only() -> tuple[nn.Module, Inputs]:
    """Both attention layers of a block look at the text."""
    return _unet(only_cross_attention=True), _inputs()


def plain_gelu() -> tuple[nn.Module, Inputs]:
    """Feed-forward layers without gates."""
    from diffusers.models.attention import FeedForward

    model = _unet()
    for module in list(model.modules()):
        if hasattr(module, "attn1"):
            module.ff = FeedForward(module.ff.net[2].out_features, activation_fn="gelu")
    return model.eval(), _inputs()


TINY_MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "sd1": sd1,
    "sd2": sd2,
    "sdxl": sdxl,
    "cross_only": cross_only,
    "plain_gelu": plain_gelu,
}
