"""SanaTransformer2DModel: Sana, whose self-attention is linear and feed-forward convolves."""

from collections.abc import Mapping
from typing import Any

from slimdiff.groups import Attention, Block, Family, FeedForward, Modulation, Shapes


def inputs(config: Mapping[str, Any]) -> Shapes:
    """Shapes of one forward: latents and Gemma states."""
    size = config["sample_size"]
    shapes: Shapes = {
        "hidden_states": (1, config["in_channels"], size, size),
        "encoder_hidden_states": (1, 300, config["caption_channels"]),
        "timestep": (1,),
    }
    return shapes | ({"guidance": (1,)} if config.get("guidance_embeds") else {})


FAMILY = Family(
    denoiser="SanaTransformer2DModel",
    blocks=(
        Block(r"time_embed", (Modulation("linear"),)),
        Block(
            r"transformer_blocks\.\d+",
            (
                Attention("attn1", fixed_queries=True),
                Attention("attn2"),
                FeedForward("ff", up="conv_inverted", depth="conv_depth", down="conv_point"),
            ),
        ),
    ),
    inputs=inputs,
    mask="encoder_attention_mask",
    kept={
        "queries and keys of self-attention": "ReLU acts on every channel: they cannot be mixed",
    },
)
