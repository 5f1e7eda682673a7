"""FluxTransformer2DModel: FLUX.1 dev, schnell and their kin."""

from collections.abc import Mapping
from typing import Any

from slimdiff.groups import Attention, Block, Family, FeedForward, Modulation, Shapes, Shared


def inputs(config: Mapping[str, Any]) -> Shapes:
    """Shapes of one forward: 1024 pixels are 4096 patches, T5 gives 512 states."""
    shapes: Shapes = {
        "hidden_states": (1, 4096, config["in_channels"]),
        "encoder_hidden_states": (1, 512, config["joint_attention_dim"]),
        "pooled_projections": (1, config["pooled_projection_dim"]),
        "timestep": (1,),
        "img_ids": (4096, 3),
        "txt_ids": (512, 3),
    }
    return shapes | ({"guidance": (1,)} if config["guidance_embeds"] else {})


FAMILY = Family(
    denoiser="FluxTransformer2DModel",
    blocks=(
        Block(
            r"transformer_blocks\.\d+",
            (
                Modulation("norm1.linear"),
                Modulation("norm1_context.linear"),
                Attention("attn", fixed_queries=True),
                FeedForward("ff"),
                FeedForward("ff_context"),
            ),
            output=1,
        ),
        Block(
            r"single_transformer_blocks\.\d+",
            (
                Modulation("norm.linear"),
                Attention("attn", out=Shared("proj_out", 0), fixed_queries=True),
                FeedForward("proj_mlp", up="", down=Shared("proj_out", 1)),
            ),
            output=1,
        ),
    ),
    inputs=inputs,
    kept={"queries and keys": "they are normalised, and rotary positions turn pairs of channels"},
)
