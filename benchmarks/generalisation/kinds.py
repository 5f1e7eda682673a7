"""References of the training framework with the widths and the world of a specification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from generalisation.specs import ModelSpec
from generalisation.worlds import World, tokens_of, world_named
from slimdiff.reference.build import LATENT_SIDE
from slimdiff.reference.contract import Reference
from slimdiff.reference.data import Shard
from slimdiff.reference.dit import PATCH, DitReference, initialise
from slimdiff.reference.objective import Denoising, draw_timesteps, loss_weights
from slimdiff.reference.unet import UnetReference


@dataclass
class CaptionedDenoising(Denoising):
    """A training step's error, captions blanked by a world's own tokens of no text (1, length)."""

    blank: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.long))

    def loss(self, batch: Shard, generator: torch.Generator) -> Tensor:
        """Weighted squared error of the prediction on `batch`."""
        n, clean = len(batch.tokens), batch.latents.float()
        noise = torch.randn(clean.shape, generator=generator)
        steps = draw_timesteps(n, generator)
        noisy, target = self.corrupt(clean, noise, steps)
        blank = torch.rand(n, generator=generator) < self.dropout
        tokens = torch.where(blank[:, None], self.blank, batch.tokens)
        guess = self.predict(noisy, steps, tokens, generator).float()
        return ((guess - target).square() * loss_weights(batch.occupied)).mean()


def captioned(denoising: Denoising, world: World) -> CaptionedDenoising:
    """The same objective with the captions of `world`."""
    return CaptionedDenoising(denoising.corrupt, denoising.predict, blank=tokens_of(world, [""]))


@dataclass(frozen=True)
class SmallUnet(UnetReference):
    """A UNet of a specification; cross-attention at the first `levels` of three.

    Attributes:
        depths: transformer blocks of each level.
        linear: linear projections around them, as in SDXL, not convolutions.
    """

    world: World = field(default_factory=lambda: world_named("scenes"))
    levels: int = 2
    depths: tuple[int, int, int] = (1, 1, 1)
    linear: bool = False

    def vae(self) -> Any:
        """The world's autoencoder."""
        return self.world.vae()

    def networks(self) -> dict[str, nn.Module]:
        """The world's text encoder and an untrained UNet."""
        text = self.world.text_encoder("unet", 0)
        return {"text": text, "unet": self._unet(text.config.hidden_size)}

    def _unet(self, text_width: int) -> nn.Module:
        from diffusers import UNet2DConditionModel

        attended = [level < self.levels for level in range(3)]
        return UNet2DConditionModel(
            sample_size=LATENT_SIDE,
            in_channels=self.world.latent_channels,
            out_channels=self.world.latent_channels,
            layers_per_block=1,
            block_out_channels=self.unet_channels,
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attended[::-1]],
            cross_attention_dim=text_width,
            attention_head_dim=self.unet_heads,  # diffusers reads this as the number of heads
            norm_num_groups=self.norm_groups,
            transformer_layers_per_block=self.depths,
            use_linear_projection=self.linear,
        )

    def denoising(self, networks: Mapping[str, nn.Module]) -> Denoising:
        """v-prediction with the world's captions; its text encoder stays as it is."""
        networks["text"].requires_grad_(False)
        return captioned(super().denoising(networks), self.world)

    def assemble(self, vae: Any, networks: Mapping[str, nn.Module], scaling: float) -> Any:
        """A StableDiffusionPipeline with the world's tokenizer."""
        pipe = super().assemble(vae, networks, scaling)
        pipe.register_modules(tokenizer=self.world.tokenizer())
        return pipe


@dataclass(frozen=True)
class SmallTransformer(DitReference):
    """An SD3 transformer of a specification."""

    world: World = field(default_factory=lambda: world_named("scenes"))

    def vae(self) -> Any:
        """The world's autoencoder."""
        return self.world.vae()

    def networks(self) -> dict[str, nn.Module]:
        """The world's text encoders, an untrained second one if it has none, and a transformer."""
        text = TwoEncoders(self)
        width = sum(e.config.hidden_size for e in (text.first, text.second))
        pooled = sum(e.config.projection_dim for e in (text.first, text.second))
        return {"text": text, "transformer": self._transformer(width, pooled)}

    def _transformer(self, text_width: int, pooled_width: int) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        model = SD3Transformer2DModel(
            sample_size=LATENT_SIDE,
            patch_size=PATCH,
            in_channels=self.world.latent_channels,
            out_channels=self.world.latent_channels,
            num_layers=self.layers,
            attention_head_dim=self.head_width,
            num_attention_heads=self.heads,
            joint_attention_dim=text_width,
            caption_projection_dim=self.heads * self.head_width,
            pooled_projection_dim=pooled_width,
            pos_embed_max_size=LATENT_SIDE // PATCH,
            qk_norm=self.qk_norm,
        )
        initialise(model)
        return model

    def denoising(self, networks: Mapping[str, nn.Module]) -> Denoising:
        """Flow matching with the world's captions; its first text encoder stays as it is."""
        networks["text"].get_submodule("first").requires_grad_(False)
        return captioned(super().denoising(networks), self.world)

    def assemble(self, vae: Any, networks: Mapping[str, nn.Module], scaling: float) -> Any:
        """A StableDiffusion3Pipeline with the world's tokenizer, without a T5 encoder."""
        pipe = super().assemble(vae, networks, scaling)
        own = self.world.tokenizer
        pipe.register_modules(tokenizer=own(), tokenizer_2=own())
        return pipe


class TwoEncoders(nn.Module):
    """Two CLIP text encoders side by side, as StableDiffusion3Pipeline reads them."""

    def __init__(self, arch: SmallTransformer) -> None:
        super().__init__()
        from transformers import CLIPTextModelWithProjection

        first, second = (arch.world.text_encoder("sd3", part) for part in (0, 1))
        self.first = first
        self.second = second or CLIPTextModelWithProjection(_second_config(first.config, arch))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, length) to states (n, length, w) and a pooled embedding (n, w)."""
        made = [e(tokens, output_hidden_states=True) for e in (self.first, self.second)]
        states = torch.cat([m.hidden_states[-2] for m in made], -1)
        return states, torch.cat([m.text_embeds for m in made], -1)


def _second_config(first: Any, arch: SmallTransformer) -> Any:
    """The configuration of a narrower encoder of the same tokens."""
    own = {
        "hidden_size": arch.second_width,
        "intermediate_size": 4 * arch.second_width,
        "projection_dim": arch.second_width,
        "num_hidden_layers": arch.second_layers,
        "num_attention_heads": arch.second_heads,
    }
    return type(first)(**{**first.to_dict(), **own})


def reference_of(spec: ModelSpec) -> Reference:
    """What the training framework asks of a reference, for a specification.

    Raises:
        KeyError: unknown world.
    """
    kinds = {"unet": SmallUnet, "sd3": SmallTransformer}
    return kinds[spec.kind](world=world_named(spec.world), **spec.widths)
