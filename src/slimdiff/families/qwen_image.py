"""QwenImageTransformer2DModel: Qwen-Image."""

from collections.abc import Mapping
from typing import Any

from slimdiff.groups import Attention, Block, Family, FeedForward, Given, Modulation, Shapes


def inputs(config: Mapping[str, Any]) -> Shapes:
    """Shapes of one forward: 1024 pixels are 64 by 64 patches; a prompt of 256 tokens."""
    return {
        "hidden_states": (1, 4096, config["in_channels"]),
        "encoder_hidden_states": (1, 256, config["joint_attention_dim"]),
        "timestep": (1,),
        "img_shapes": Given([[(1, 64, 64)]]),
    }


FAMILY = Family(
    denoiser="QwenImageTransformer2DModel",
    blocks=(
        Block(
            r"transformer_blocks\.\d+",
            (
                Modulation("img_mod.1"),
                Modulation("txt_mod.1"),
                Attention("attn", fixed_queries=True),
                FeedForward("img_mlp"),
                FeedForward("txt_mlp", text=True),
            ),
            output=1,
        ),
    ),
    inputs=inputs,
    mask="encoder_hidden_states_mask",
    kept={"queries and keys": "they are normalised, and rotary positions turn pairs of channels"},
)
