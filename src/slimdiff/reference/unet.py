"""Reference pipelines with a UNet with cross-attention, trained on v-prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimdiff.reference.attention import PlainAttention
from slimdiff.reference.build import (
    LATENT_SIDE,
    Architecture,
    build_vae,
    device_of,
    text_config,
)
from slimdiff.reference.objective import Denoising
from slimdiff.reference.tokenizer import encode_captions

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

OUTER = ("conv_in", "conv_out", "time_embedding", "time_emb_proj")
"""Parts of the UNet's parameter names that Muon leaves to AdamW."""


@dataclass(frozen=True)
class UnetReference(Architecture):
    """Widths of the pipeline's three networks, and how they are trained and put together.

    `attention_levels` of the three levels, the finer ones, have attention.
    """

    unet_channels: tuple[int, int, int] = (96, 160, 160)
    unet_heads: tuple[int, int, int] = (2, 4, 4)
    attention_levels: int = 2
    muon_text: bool = False

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
        return {"this pipeline": {"guidance_scale": self.world.guidance}}

    @property
    def training(self) -> str:
        """How the denoiser was trained."""
        taught = self.world.teach is not None
        muon = "the matrices of UNet and text encoder" if self.muon_text else "the UNet's matrices"
        text = "first learnt to read captions, then was" if taught else "was from the beginning"
        return (
            f"Muon for {muon}, AdamW for the rest, averaged weights. The text encoder {text} "
            "trained with the UNet."
        )

    def vae(self) -> Any:
        """The untrained autoencoder."""
        return build_vae(self)

    def networks(self) -> dict[str, nn.Module]:
        """The untrained networks."""
        from transformers import CLIPTextModel

        config = text_config(self.world, self.text_width, self.text_layers, self.text_heads)
        return {"text": CLIPTextModel(config), "unet": build_unet(self)}

    def states(self, text: nn.Module, tokens: Tensor) -> Tensor:
        """What the UNet sees of tokens (n, length): (n, length, text_width)."""
        return text(tokens).last_hidden_state

    def is_matrix(self, name: str, parameter: Tensor) -> bool:
        """Whether Muon trains it: inner convolutions and linear layers of the UNet.

        With `muon_text`, linear layers of the text encoder too.
        """
        if name.startswith("unet."):
            return parameter.ndim >= 2 and not any(word in name for word in OUTER)
        return self.muon_text and parameter.ndim >= 2 and ".layers." in name

    def denoising(self, networks: Mapping[str, nn.Module]) -> Denoising:
        """v-prediction by the scheduler's signal shares."""
        text, unet = networks["text"], networks["unet"]
        device = device_of(networks)
        if device.type == "cpu":
            unet.set_attn_processor(PlainAttention())  # type: ignore[operator]  # a diffusers model
        alphas = build_scheduler().alphas_cumprod.to(device)
        blank = encode_captions(self.world.tokenizer(), [""])

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

        return Denoising(corrupt, predict, blank.to(device))

    def assemble(
        self, vae: Any, networks: Mapping[str, nn.Module], scaling: float
    ) -> StableDiffusionPipeline:
        """A StableDiffusionPipeline of the three networks, without a safety checker."""
        from diffusers import StableDiffusionPipeline

        vae.register_to_config(scaling_factor=scaling)
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=networks["text"],
            tokenizer=self.world.tokenizer(),
            unet=networks["unet"],
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def parts(self, pipe: Any) -> Mapping[str, nn.Module]:
        """Its networks, as in `networks`."""
        return {"text": pipe.text_encoder, "unet": pipe.unet}

    def describe(self, pipe: Any) -> dict[str, str]:
        """What its components are."""
        text, channels = pipe.text_encoder.config, tuple(pipe.unet.config.block_out_channels)
        layers, width = text.num_hidden_layers, text.hidden_size
        return {
            "unet": f"UNet2DConditionModel, channels {channels}, attention at "
            f"{('one', 'two', 'all')[self.attention_levels - 1]} levels",
            "text_encoder": f"CLIPTextModel, {layers} layers, width {width}, a token per word",
            "vae": f"AutoencoderKL to 16 by 16 by {self.latent_channels} latents",
            "scheduler": "DDIM, v-prediction, zero terminal signal, trailing timesteps",
        }


def build_unet(arch: UnetReference) -> UNet2DConditionModel:
    """The denoiser, in SD1.5's proportions: attention at the finer levels, GEGLU, wide heads."""
    from diffusers import UNet2DConditionModel

    attended = arch.attention_levels
    plain = len(arch.unet_channels) - attended
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=arch.latent_channels,
        out_channels=arch.latent_channels,
        layers_per_block=1,
        block_out_channels=arch.unet_channels,
        down_block_types=("CrossAttnDownBlock2D",) * attended + ("DownBlock2D",) * plain,
        up_block_types=("UpBlock2D",) * plain + ("CrossAttnUpBlock2D",) * attended,
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
