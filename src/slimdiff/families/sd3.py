"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5."""

from collections.abc import Mapping
from typing import Any

from slimdiff.groups import Attention, Block, Family, FeedForward, Modulation, Shapes


def inputs(config: Mapping[str, Any]) -> Shapes:
    """Shapes of one forward: latents, text states (77 of CLIP, 256 of T5), pooled text."""
    size = config["sample_size"]
    return {
        "hidden_states": (1, config["in_channels"], size, size),
        "encoder_hidden_states": (1, 77 + 256, config["joint_attention_dim"]),
        "pooled_projections": (1, config["pooled_projection_dim"]),
        "timestep": (1,),
    }


FAMILY = Family(
    denoiser="SD3Transformer2DModel",
    blocks=(
        Block(
            r"transformer_blocks\.\d+",
            (
                Modulation("norm1.linear"),
                Modulation("norm1_context.linear"),
                Attention("attn"),
                Attention("attn2"),
                FeedForward("ff"),
                FeedForward("ff_context"),
            ),
            output=1,
        ),
    ),
    inputs=inputs,
    kept={
        "queries and keys of SD3.5": "they are normalised over the channels of a head",
    },
)
