"""The reference pipeline `scenes-dit`: an SD3 transformer with joint attention, flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimdiff.reference.attention import PlainJointAttention
from slimdiff.reference.build import (
    LATENT_SIDE,
    Architecture,
    build_vae,
    device_of,
    text_config,
)
from slimdiff.reference.objective import TIMESTEPS, Denoising
from slimdiff.reference.tokenizer import encode_captions

if TYPE_CHECKING:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

PATCH = 2
EMPTY_TOKENS = (1, 20, 77, 256)
"""How many zero tokens stand in for the absent T5 encoder, drawn for each sample in training."""


@dataclass(frozen=True)
class DitReference(Architecture):
    """Widths of the pipeline's networks, and how they are trained and put together.

    The first text encoder has a layer more than the denoiser sees: as SD3's, the transformer takes
    the states before the last layer, and the last layer makes the pooled embedding.
    """

    text_layers: int = 4
    second_width: int = 64
    second_layers: int = 2
    second_heads: int = 2
    heads: int = 4
    head_width: int = 48
    layers: int = 8
    qk_norm: str | None = None

    @property
    def denoiser(self) -> str:
        """The denoiser's name in the pipeline."""
        return "transformer"

    @property
    def sampling(self) -> Mapping[str, dict[str, Any]]:
        """Ways to call the pipeline that its model card reports."""
        guided = {"guidance_scale": self.world.guidance}
        return {
            "this pipeline, `max_sequence_length=1`": guided | {"max_sequence_length": 1},
            "this pipeline, the stock length of 256": guided | {"max_sequence_length": 256},
        }

    @property
    def training(self) -> str:
        """How the denoiser was trained."""
        return (
            "Flow matching. Muon for the matrices of the transformer's attention and feed-forward "
            "layers, AdamW for the rest, averaged weights. The text encoders first learnt to read "
            "scenes off captions, then were trained with the transformer. There is no T5 encoder; "
            "the zero tokens that stand in for it were as many as "
            f"{', '.join(map(str, EMPTY_TOKENS))} in training, so that any "
            "`max_sequence_length` works, and 1 is the fastest."
        )

    def vae(self) -> Any:
        """The untrained autoencoder."""
        return build_vae(self)

    def networks(self) -> dict[str, nn.Module]:
        """The untrained networks."""
        return {"text": TextEncoders(self), "transformer": build_transformer(self)}

    def states(self, text: nn.Module, tokens: Tensor) -> Tensor:
        """What the transformer sees of tokens (n, l): (n, l, text_width + second_width)."""
        return text(tokens)[0]

    def is_matrix(self, name: str, parameter: Tensor) -> bool:
        """Whether Muon trains it: attention and feed-forward layers of the transformer."""
        return ".transformer_blocks." in name and parameter.ndim == 2 and ".norm" not in name

    def denoising(self, networks: Mapping[str, nn.Module]) -> Denoising:
        """Flow matching: the velocity from a clean latent to noise along the line between them."""
        text, transformer = networks["text"], networks["transformer"]
        transformer.set_attn_processor(PlainJointAttention())  # type: ignore[operator]  # diffusers
        device = device_of(networks)
        lengths = torch.tensor(EMPTY_TOKENS, device=device)
        blank = encode_captions(self.world.tokenizer(), [""])

        def corrupt(clean: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
            sigma = ((steps + 1) / TIMESTEPS)[:, None, None, None]
            return (1 - sigma) * clean + sigma * noise, noise - clean

        def predict(
            noisy: Tensor, steps: Tensor, tokens: Tensor, generator: torch.Generator
        ) -> Tensor:
            states, pooled = text(tokens)
            picks = torch.randint(len(lengths), (len(noisy),), generator=generator, device=device)
            empty = states.new_zeros(len(states), 1, states.shape[2])
            return transformer(
                noisy.to(states.dtype),
                encoder_hidden_states=torch.cat([states, empty], 1),
                pooled_projections=pooled,
                timestep=(steps + 1).float(),
                joint_attention_kwargs={"copies": lengths[picks]},
                return_dict=False,
            )[0]

        return Denoising(corrupt, predict, blank.to(device))

    def assemble(
        self, vae: Any, networks: Mapping[str, nn.Module], scaling: float
    ) -> StableDiffusion3Pipeline:
        """A StableDiffusion3Pipeline of the networks, without a T5 encoder."""
        from diffusers import StableDiffusion3Pipeline

        vae.register_to_config(scaling_factor=scaling, shift_factor=0.0)
        text: Any = networks["text"]
        return StableDiffusion3Pipeline(
            transformer=networks["transformer"],
            scheduler=build_scheduler(),
            vae=vae,
            text_encoder=text.first,
            tokenizer=self.world.tokenizer(),
            text_encoder_2=text.second,
            tokenizer_2=self.world.tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )

    def parts(self, pipe: Any) -> Mapping[str, nn.Module]:
        """Its networks, as in `networks`."""
        both = {"first": pipe.text_encoder, "second": pipe.text_encoder_2}
        return {"text": nn.ModuleDict(both), "transformer": pipe.transformer}

    def describe(self, pipe: Any) -> dict[str, str]:
        """What its components are."""
        c = pipe.transformer.config
        norm = f", {c.qk_norm} of queries and keys" if c.qk_norm else ""
        text = "CLIPTextModelWithProjection, {} layers, width {}, a token per word"
        first, second = pipe.text_encoder.config, pipe.text_encoder_2.config
        return {
            "transformer": f"SD3Transformer2DModel, {c.num_layers} joint blocks, "
            f"{c.num_attention_heads} heads of {c.attention_head_dim}{norm}",
            "text_encoder": text.format(first.num_hidden_layers, first.hidden_size),
            "text_encoder_2": text.format(second.num_hidden_layers, second.hidden_size),
            "vae": f"AutoencoderKL to 16 by 16 by {self.latent_channels} latents",
            "scheduler": f"FlowMatchEulerDiscreteScheduler, shift {pipe.scheduler.config.shift:g}",
        }


class TextEncoders(nn.Module):
    """The two CLIP text encoders, side by side, as StableDiffusion3Pipeline reads them."""

    def __init__(self, arch: DitReference) -> None:
        super().__init__()
        from transformers import CLIPTextModelWithProjection as Encoder

        first = text_config(arch.world, arch.text_width, arch.text_layers, arch.text_heads)
        second = text_config(arch.world, arch.second_width, arch.second_layers, arch.second_heads)
        self.first, self.second = Encoder(first), Encoder(second)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, length) to states (n, length, w) and a pooled embedding (n, w)."""
        made = [e(tokens, output_hidden_states=True) for e in (self.first, self.second)]
        states = torch.cat([m.hidden_states[-2] for m in made], -1)
        return states, torch.cat([m.text_embeds for m in made], -1)


def build_transformer(arch: DitReference) -> SD3Transformer2DModel:
    """The denoiser, every block of which begins as the identity."""
    from diffusers import SD3Transformer2DModel

    width = arch.heads * arch.head_width
    text_width = arch.text_width + arch.second_width
    model = SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=PATCH,
        in_channels=arch.latent_channels,
        out_channels=arch.latent_channels,
        num_layers=arch.layers,
        attention_head_dim=arch.head_width,
        num_attention_heads=arch.heads,
        joint_attention_dim=text_width,
        caption_projection_dim=width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=LATENT_SIDE // PATCH,
        qk_norm=arch.qk_norm,
    )
    initialise(model)
    return model


@torch.no_grad()
def initialise(transformer: SD3Transformer2DModel) -> None:
    """Xavier weights; modulations and the output begin at zero (Peebles & Xie 2023)."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
            if name.endswith(("norm1.linear", "norm1_context.linear")) or name == "proj_out":
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
    nn.init.zeros_(transformer.norm_out.linear.weight)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps along the flow."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=1.0)
