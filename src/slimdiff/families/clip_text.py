"""CLIPTextModel: the text encoder of Stable Diffusion, and the first one of SDXL and FLUX."""

from collections.abc import Mapping
from typing import Any

from slimdiff.groups import Attention, Block, Family, FeedForward, Integers, Shapes


def inputs(config: Mapping[str, Any]) -> Shapes:
    """Shapes of one forward: a prompt is padded to all positions."""
    return {"input_ids": Integers((1, config["max_position_embeddings"]))}


FAMILY = Family(
    denoiser="CLIPTextModel",
    blocks=(
        Block(
            r"(.+\.)?encoder\.layers\.\d+",
            (
                Attention(
                    "self_attn",
                    q="q_proj",
                    k="k_proj",
                    v="v_proj",
                    out="out_proj",
                    heads="num_heads",
                    tied=True,
                ),
                FeedForward("mlp", up="fc1", down="fc2"),
            ),
        ),
    ),
    inputs=inputs,
    kept={"embeddings": "every token and position has its own row"},
    text=True,
)
