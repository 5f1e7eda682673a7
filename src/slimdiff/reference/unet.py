"""The reference pipeline `scenes-unet`: a UNet with cross-attention, trained on v-prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimdiff.reference.attention import PlainAttention
from slimdiff.reference.build import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    Architecture,
    build_vae,
    text_config,
)
from slimdiff.reference.objective import Denoising
from slimdiff.reference.tokenizer import tokenizer

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

OUTER = ("conv_in", "conv_out", "time_embedding", "time_emb_proj")
"""Parts of the UNet's parameter names that Muon leaves to AdamW."""


@dataclass(frozen=True)
class UnetReference(Architecture):
    """Widths of the pipeline's three networks, and how they are trained and put together."""

    unet_channels: tuple[int, int, int] = (96, 160, 160)
    unet_heads: tuple[int, int, int] = (2, 4, 4)

    def __post_init__(self) -> None:
        for channels in self.unet_channels:
            if channels % self.norm_groups:
                raise ValueError(f"{channels} channels do not split into {self.norm_groups} groups")

    @property
    def denoiser(self) -> str:
        """The denoiser's name in the pipeline."""
        return "unet"

    @property
    def sampling(self) -> Mapping[str, dict[str, Any]]:
        """Ways to call the pipeline that its model card reports."""
        return {"this pipeline": {}}

    @property
    def training(self) -> str:
        """How the denoiser was trained."""
        return (
            "Muon for the UNet's matrices, AdamW for the rest, averaged weights. The text encoder "
            "first learnt to read scenes off captions, then was trained with the UNet."
        )

    def vae(self) -> Any:
        """The untrained autoencoder."""
        return build_vae(self)

    def networks(self) -> dict[str, nn.Module]:
        """The untrained networks."""
        from transformers import CLIPTextModel

        config = text_config(self.text_width, self.text_layers, self.text_heads)
        return {"text": CLIPTextModel(config), "unet": build_unet(self)}

    def states(self, text: nn.Module, tokens: Tensor) -> Tensor:
        """What the UNet sees of tokens (n, 20): (n, 20, text_width)."""
        return text(tokens).last_hidden_state

    def is_matrix(self, name: str, parameter: Tensor) -> bool:
        """Whether Muon trains it: inner convolutions and linear layers of the UNet."""
        inner = name.startswith("unet.") and parameter.ndim >= 2
        return inner and not any(word in name for word in OUTER)

    def denoising(self, networks: Mapping[str, nn.Module]) -> Denoising:
        """v-prediction by the scheduler's signal shares."""
        text, unet = networks["text"], networks["unet"]
        unet.set_attn_processor(PlainAttention())  # type: ignore[operator]  # a diffusers model
        alphas = build_scheduler().alphas_cumprod

        def corrupt(clean: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
            signal = alphas[steps, None, None, None]
            noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
            return noisy, signal.sqrt() * noise - (1 - signal).sqrt() * clean

        def predict(
            noisy: Tensor, steps: Tensor, tokens: Tensor, generator: torch.Generator
        ) -> Tensor:
            states = self.states(text, tokens)
            noisy = noisy.to(states.dtype).contiguous(memory_format=torch.channels_last)
            return unet(noisy, steps, states, return_dict=False)[0]

        return Denoising(corrupt, predict)

    def assemble(
        self, vae: Any, networks: Mapping[str, nn.Module], scaling: float
    ) -> StableDiffusionPipeline:
        """A StableDiffusionPipeline of the three networks, without a safety checker."""
        from diffusers import StableDiffusionPipeline

        vae.register_to_config(scaling_factor=scaling)
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=networks["text"],
            tokenizer=tokenizer(),
            unet=networks["unet"],
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def describe(self, pipe: Any) -> dict[str, str]:
        """What its components are."""
        text, channels = pipe.text_encoder.config, tuple(pipe.unet.config.block_out_channels)
        layers, width = text.num_hidden_layers, text.hidden_size
        return {
            "unet": f"UNet2DConditionModel, channels {channels}, attention at two levels",
            "text_encoder": f"CLIPTextModel, {layers} layers, width {width}, a token per word",
            "vae": "AutoencoderKL to 16 by 16 by 4 latents",
            "scheduler": "DDIM, v-prediction, zero terminal signal, trailing timesteps",
        }


def build_unet(arch: UnetReference) -> UNet2DConditionModel:
    """The denoiser, in SD1.5's proportions: attention at two levels, GEGLU, wide heads."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
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
