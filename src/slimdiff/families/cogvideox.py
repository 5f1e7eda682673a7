"""CogVideoXTransformer3DModel: CogVideoX 2B, 5B and 1.5."""

from collections.abc import Mapping
from typing import Any

from slimdiff.groups import Attention, Block, Family, FeedForward, Modulation, Shapes


def inputs(config: Mapping[str, Any]) -> Shapes:
    """Shapes of one forward: latents of a whole clip, T5 states, rotary positions if it has any."""
    height, width, patch = config["sample_height"], config["sample_width"], config["patch_size"]
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    deep = config["patch_size_t"] or 1
    frames += -frames % deep
    shapes: Shapes = {
        "hidden_states": (1, frames, config["in_channels"], height, width),
        "encoder_hidden_states": (1, config["max_text_seq_length"], config["text_embed_dim"]),
        "timestep": (1,),
    }
    if config["use_rotary_positional_embeddings"]:
        tokens = frames // deep * (height // patch) * (width // patch)
        shapes["image_rotary_emb"] = [(tokens, config["attention_head_dim"])] * 2
    return shapes


FAMILY = Family(
    denoiser="CogVideoXTransformer3DModel",
    blocks=(
        Block(
            r"transformer_blocks\.\d+",
            (
                Modulation("norm1.linear"),
                Modulation("norm2.linear"),
                Attention("attn1", fixed_queries=True),
                FeedForward("ff"),
            ),
        ),
    ),
    inputs=inputs,
    kept={"queries and keys": "they are normalised over the channels of a head, or rotary"},
)
