"""DiTTransformer2DModel: DiT, conditioned on a class instead of a text."""

from collections.abc import Mapping
from typing import Any

from slimdiff.groups import Attention, Block, Family, FeedForward, Integers, Modulation, Shapes


def inputs(config: Mapping[str, Any]) -> Shapes:
    """Shapes of one forward: latents, timestep and class."""
    size = config["sample_size"]
    return {
        "hidden_states": (1, config["in_channels"], size, size),
        "timestep": Integers((1,)),
        "class_labels": Integers((1,)),
    }


FAMILY = Family(
    denoiser="DiTTransformer2DModel",
    blocks=(
        Block(
            r"transformer_blocks\.\d+",
            (Modulation("norm1.linear", shared=False), Attention("attn1"), FeedForward("ff")),
        ),
    ),
    inputs=inputs,
)
