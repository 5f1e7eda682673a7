"""WanTransformer3DModel: Wan 2.1 and 2.2, text and image to video."""

from collections.abc import Mapping
from typing import Any

from slimdiff.groups import Attention, Block, Family, FeedForward, Modulation, Shapes


def inputs(config: Mapping[str, Any]) -> Shapes:
    """Shapes of one forward: 81 frames of 832 by 480 pixels, T5 states, image states if any."""
    shapes: Shapes = {
        "hidden_states": (1, config["in_channels"], 21, 60, 104),
        "timestep": (1,),
        "encoder_hidden_states": (1, 512, config["text_dim"]),
    }
    if config["image_dim"] is not None:
        shapes["encoder_hidden_states_image"] = (1, 257, config["image_dim"])
    return shapes


FAMILY = Family(
    denoiser="WanTransformer3DModel",
    blocks=(
        Block(r"condition_embedder", (Modulation("time_proj"),)),
        Block(
            r"blocks\.\d+",
            (
                Attention("attn1", fixed_queries=True),
                Attention("attn2", fixed_queries=True),
                FeedForward("ffn"),
            ),
        ),
    ),
    inputs=inputs,
    kept={"queries and keys": "they are normalised over all heads, and rotary positions turn them"},
)
