"""The parts of the reference pipeline `scenes-unet`, untrained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimdiff.reference.scenes import SIDE
from slimdiff.reference.tokenizer import LENGTH, tokenizer

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel

LATENT_CHANNELS = 4


@dataclass(frozen=True)
class Architecture:
    """Widths of the pipeline's three networks."""

    vae_channels: tuple[int, int, int] = (32, 64, 64)
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    unet_channels: tuple[int, int, int] = (96, 160, 160)
    unet_heads: tuple[int, int, int] = (2, 4, 4)
    norm_groups: int = 32

    def __post_init__(self) -> None:
        for channels in self.unet_channels:
            if channels % self.norm_groups:
                raise ValueError(f"{channels} channels do not split into {self.norm_groups} groups")


def build_vae(arch: Architecture) -> AutoencoderKL:
    """Images (n, 3, 64, 64) from -1 to 1 to latents (n, 4, 16, 16)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=arch.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=min(arch.norm_groups, 16),
        mid_block_add_attention=False,
        sample_size=SIDE,
    )


def build_text_encoder(arch: Architecture) -> CLIPTextModel:
    """Tokens (n, 20) to hidden states (n, 20, text_width)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokens = tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=arch.text_width,
            intermediate_size=4 * arch.text_width,
            projection_dim=arch.text_width,
            num_hidden_layers=arch.text_layers,
            num_attention_heads=arch.text_heads,
            max_position_embeddings=LENGTH,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )


def build_unet(arch: Architecture) -> UNet2DConditionModel:
    """The denoiser, in SD1.5's proportions: attention at two levels, GEGLU, wide heads."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=arch.unet_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=arch.text_width,
        attention_head_dim=arch.unet_heads,  # diffusers reads this as the number of heads
        norm_num_groups=arch.norm_groups,
    )


def build_scheduler() -> DDIMScheduler:
    """DDIM for v-prediction, with zero terminal signal, so that brightness can be learnt."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # trailing spacing ignores it; the pipeline warns about any other value
    )


def assemble(vae: Any, text_encoder: Any, unet: Any) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline of the three networks, without a safety checker."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
