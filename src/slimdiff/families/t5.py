"""T5EncoderModel: the text encoder of PixArt and DiT-like models, the last one of SD3 and FLUX."""

from collections.abc import Mapping
from typing import Any

from slimdiff.groups import Attention, Block, Family, FeedForward, Integers, Shapes


def inputs(config: Mapping[str, Any]) -> Shapes:
    """Shapes of one forward: 256 tokens."""
    return {"input_ids": Integers((1, 256))}


FAMILY = Family(
    denoiser="T5EncoderModel",
    blocks=(
        Block(
            r"encoder\.block\.\d+",
            (
                Attention(
                    "layer.0.SelfAttention",
                    q="q",
                    k="k",
                    v="v",
                    out="o",
                    heads="n_heads",
                    unscaled=True,
                    tied=True,
                    fixed_heads=True,
                ),
                FeedForward(
                    "layer.1.DenseReluDense", up="wi_1", gate="wi_0", plain="wi", down="wo"
                ),
            ),
        ),
    ),
    inputs=inputs,
    kept={
        "embeddings": "every token has its own row",
        "whole heads": "a bias of its own is added to the products of every head, in all layers",
    },
    text=True,
)
