"""HunyuanDiT2DModel: HunyuanDiT 1.1 and 1.2.

Its masks are no `mask`: they put a learned vector in the place of padding, and attention looks at
all tokens.
"""

from collections.abc import Mapping
from typing import Any

from slimdiff.groups import Attention, Block, Family, FeedForward, Integers, Modulation, Shapes


def inputs(config: Mapping[str, Any]) -> Shapes:
    """Shapes of one forward: latents, CLIP and T5 states with their masks, rotary positions."""
    size, patch = config["sample_size"], config["patch_size"]
    positions = ((size // patch) ** 2, config["attention_head_dim"])
    shapes: Shapes = {
        "hidden_states": (1, config["in_channels"], size, size),
        "timestep": (1,),
        "encoder_hidden_states": (1, config["text_len"], config["cross_attention_dim"]),
        "text_embedding_mask": (1, config["text_len"]),
        "encoder_hidden_states_t5": (1, config["text_len_t5"], config["cross_attention_dim_t5"]),
        "text_embedding_mask_t5": (1, config["text_len_t5"]),
        "image_rotary_emb": [positions, positions],
    }
    if config["use_style_cond_and_image_meta_size"]:
        shapes |= {"image_meta_size": (1, 6), "style": Integers((1,))}
    return shapes


FAMILY = Family(
    denoiser="HunyuanDiT2DModel",
    blocks=(
        Block(
            r"blocks\.\d+",
            (
                Modulation("norm1.linear"),
                Attention("attn1", fixed_queries=True),
                Attention("attn2", fixed_queries=True),
                FeedForward("ff"),
            ),
        ),
    ),
    inputs=inputs,
    kept={
        "queries and keys": "they are normalised, and rotary positions turn pairs of channels",
        "skip_linear": "it joins two residual streams",
    },
)
