"""References of the training framework with the widths and the world of a specification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from generalisation.specs import ModelSpec
from generalisation.worlds import world_named
from slimdiff.reference.build import LATENT_SIDE
from slimdiff.reference.dit import DitReference
from slimdiff.reference.objective import Denoising
from slimdiff.reference.unet import UnetReference


@dataclass(frozen=True)
class SmallUnet(UnetReference):
    """A UNet of a specification.

    Attributes:
        depths: transformer blocks of each level.
        linear: linear projections around them, as in SDXL, not convolutions.
    """

    depths: tuple[int, int, int] = (1, 1, 1)
    linear: bool = False

    def networks(self) -> dict[str, nn.Module]:
        """The untrained networks."""
        return super().networks() | {"unet": self._unet()}

    def _unet(self) -> nn.Module:
        from diffusers import UNet2DConditionModel

        attended = [level < self.attention_levels for level in range(3)]
        return UNet2DConditionModel(
            sample_size=LATENT_SIDE,
            in_channels=self.latent_channels,
            out_channels=self.latent_channels,
            layers_per_block=1,
            block_out_channels=self.unet_channels,
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attended[::-1]],
            cross_attention_dim=self.text_width,
            attention_head_dim=self.unet_heads,  # diffusers reads this as the number of heads
            norm_num_groups=self.norm_groups,
            transformer_layers_per_block=self.depths,
            use_linear_projection=self.linear,
        )

    def denoising(self, networks: Mapping[str, nn.Module]) -> Denoising:
        """v-prediction; the text encoder stays as it is."""
        networks["text"].requires_grad_(False)
        return super().denoising(networks)


@dataclass(frozen=True)
class SmallTransformer(DitReference):
    """An SD3 transformer of a specification."""

    def denoising(self, networks: Mapping[str, nn.Module]) -> Denoising:
        """Flow matching; the first text encoder stays as it is."""
        networks["text"].get_submodule("first").requires_grad_(False)
        return super().denoising(networks)


def reference_of(spec: ModelSpec) -> Any:
    """What the training framework asks of a reference, for a specification.

    Raises:
        KeyError: unknown world.
    """
    lent = world_named(spec.world)
    kinds = {"unet": SmallUnet, "sd3": SmallTransformer}
    return kinds[spec.kind](world=lent.world, **lent.widths, **spec.widths)
