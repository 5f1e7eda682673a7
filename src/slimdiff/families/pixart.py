"""PixArtTransformer2DModel: PixArt-Alpha and PixArt-Sigma."""

from collections.abc import Mapping
from typing import Any

from slimdiff.groups import Attention, Block, Family, FeedForward, Given, Modulation, Shapes


def inputs(config: Mapping[str, Any]) -> Shapes:
    """Shapes of one forward: latents and T5 states; Alpha at 1024 pixels is told the size too."""
    size = config["sample_size"]
    sized = config["use_additional_conditions"] or (
        config["use_additional_conditions"] is None and size == 128
    )
    return {
        "hidden_states": (1, config["in_channels"], size, size),
        "encoder_hidden_states": (1, 300, config["caption_channels"]),
        "timestep": (1,),
        "added_cond_kwargs": {
            "resolution": (1, 2) if sized else Given(None),
            "aspect_ratio": (1, 1) if sized else Given(None),
        },
    }


FAMILY = Family(
    denoiser="PixArtTransformer2DModel",
    blocks=(
        Block(r"adaln_single", (Modulation("linear"),)),
        Block(
            r"transformer_blocks\.\d+",
            (Attention("attn1"), Attention("attn2"), FeedForward("ff")),
        ),
    ),
    inputs=inputs,
    mask="encoder_attention_mask",
)
