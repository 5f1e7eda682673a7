"""UNet2DConditionModel: Stable Diffusion 1.x and 2.x, SDXL and their kin."""

from collections.abc import Mapping
from typing import Any

from slimdiff.groups import Attention, Block, Family, FeedForward, Projection, ResNet, Shapes


def inputs(config: Mapping[str, Any]) -> Shapes:
    """Shapes of one forward: latents, text states and, for SDXL, pooled text and time ids."""
    size, width = config["sample_size"], config["cross_attention_dim"]
    height_width = (size, size) if isinstance(size, int) else tuple(size)
    shapes: Shapes = {
        "sample": (1, config["in_channels"], *height_width),
        "timestep": (1,),
        "encoder_hidden_states": (1, 77, width if isinstance(width, int) else width[0]),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = (
            config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        )
        shapes["added_cond_kwargs"] = {"text_embeds": (1, pooled), "time_ids": (1, 6)}
    return shapes


FAMILY = Family(
    denoiser="UNet2DConditionModel",
    blocks=(
        Block(r".+\.resnets\.\d+", (ResNet(), Projection("conv_shortcut"))),
        Block(r".+\.downsamplers\.\d+", (Projection("conv"),)),
        Block(r".+\.upsamplers\.\d+", (Projection("conv", upsampled=True),)),
        Block(r".+\.attentions\.\d+\.proj_(in|out)", (Projection(),)),
        Block(
            r".+\.transformer_blocks\.\d+",
            (Attention("attn1"), Attention("attn2"), FeedForward("ff")),
        ),
    ),
    inputs=inputs,
    mask="encoder_attention_mask",
)
