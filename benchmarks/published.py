"""The published configurations of one model of each family, as their config.json has them.

What is left out is diffusers' default. The parameter counts that they give are the check.
"""

from __future__ import annotations

from typing import Any

from shapes import CROSS_DOWN, DOWN, PIXART, SD3, SD15, SDXL

CONTROLNET: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("UNet2DConditionModel", SD15),
    "sdxl": ("UNet2DConditionModel", SDXL),
    "sd15-controlnet": ("ControlNetModel", CONTROLNET),
    "sd3-medium": ("SD3Transformer2DModel", SD3),
    "sd3.5-medium": (
        "SD3Transformer2DModel",
        SD3
        | {
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
    ),
    "sd3.5-large": (
        "SD3Transformer2DModel",
        SD3
        | {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "qk_norm": "rms_norm",
        },
    ),
    "flux-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux-schnell": ("FluxTransformer2DModel", {"guidance_embeds": False}),
    "pixart-sigma": ("PixArtTransformer2DModel", PIXART),
    "dit-xl-2": (
        "DiTTransformer2DModel",
        {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8},
    ),
    "sana-1.6b": ("SanaTransformer2DModel", {"sample_size": 32}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "cogvideox-2b": ("CogVideoXTransformer3DModel", {}),
    "cogvideox-5b": (
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 48,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
        },
    ),
    "wan2.1-1.3b": (
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    ),
    "wan2.1-14b": ("WanTransformer3DModel", {}),
    "hunyuan-dit": (
        "HunyuanDiT2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 128,
            "hidden_size": 1408,
            "num_layers": 40,
            "mlp_ratio": 4.3637,
            "use_style_cond_and_image_meta_size": False,
        },
    ),
}
