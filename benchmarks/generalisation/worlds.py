"""What the models of the generalisation set draw: where networks, pictures and prompts come from.

A world hands over its trained autoencoder and text encoder, which every model of it shares, its
pictures as shards of latents, and prompts, so that only a denoiser has to be trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from slimdiff.reference.build import Architecture, build_vae
from slimdiff.reference.bundled import bundled_path
from slimdiff.reference.captions import prompts
from slimdiff.reference.data import cached_shard
from slimdiff.reference.tokenizer import tokenizer as scenes_tokenizer

SHARD = 2048
"""Pictures of one shard of latents."""


class World(Protocol):
    """One kind of picture and its captions."""

    name: str
    latent_channels: int
    guidance: float
    shards: int
    """How many shards of `SHARD` pictures there are to train on."""

    def vae(self) -> Any:
        """The trained autoencoder, to latents of 16 by 16."""

    def scaling(self) -> float:
        """What its latents are multiplied by."""

    def text_encoder(self, kind: str, part: int) -> Any | None:
        """The trained CLIP encoder `part` (0 or 1) for a pipeline of `kind`; None: train one."""

    def tokenizer(self) -> Any:
        """The tokenizer of all its encoders."""

    def fill(self, folder: Path, index: int) -> None:
        """Leave shard `index` of training latents and tokens in `folder`."""

    def prompts(self, split: str, count: int) -> list[str]:
        """Distinct prompts of `calibration` or `test`, of no model's training pairs if `test`."""


class ScenesWorld:
    """One or two shapes on a lit background; networks of the bundled references."""

    name, latent_channels, guidance, shards = "scenes", 4, 3.0, 4

    def vae(self) -> Any:
        """The autoencoder of `scenes-unet`."""
        vae = build_vae(Architecture())
        path = bundled_path("scenes-unet") / "vae" / "diffusion_pytorch_model.safetensors"
        vae.load_state_dict(load_file(path))
        return vae

    def scaling(self) -> float:
        """As the bundled pipeline has it."""
        from diffusers import AutoencoderKL

        return AutoencoderKL.load_config(bundled_path("scenes-unet") / "vae")["scaling_factor"]

    def text_encoder(self, kind: str, part: int) -> Any:
        """Of `scenes-unet`, or one of the two of `scenes-dit`."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        if kind == "unet":
            return CLIPTextModel.from_pretrained(bundled_path("scenes-unet") / "text_encoder")
        folder = bundled_path("scenes-dit") / ("text_encoder", "text_encoder_2")[part]
        return CLIPTextModelWithProjection.from_pretrained(folder)

    def tokenizer(self) -> Any:
        """A token a word, padded to 20."""
        return scenes_tokenizer()

    def fill(self, folder: Path, index: int) -> None:
        """Scenes of the training split, the same for every model."""
        cached_shard(folder, self.vae().eval(), self.scaling(), SHARD, index)

    def prompts(self, split: str, count: int) -> list[str]:
        """Captions of a held-out split."""
        found = list(dict.fromkeys(prompts(split, 2 * count)))
        return found[:count]


def _emoji() -> World:
    from generalisation.emoji import EmojiWorld

    return EmojiWorld()


WORLDS: dict[str, Callable[[], World]] = {"scenes": ScenesWorld, "emoji": _emoji}


def world_named(name: str) -> World:
    """The world of that name.

    Raises:
        KeyError: unknown; says what is known.
    """
    if name not in WORLDS:
        raise KeyError(f"no world {name!r}; known: {', '.join(WORLDS)}")
    return WORLDS[name]()


def tokens_of(world: World, captions: list[str]) -> Tensor:
    """Token ids (n, length), padded as the pipeline pads them."""
    tokenizer = world.tokenizer()
    length = tokenizer.model_max_length
    found = tokenizer(captions, padding="max_length", max_length=length, truncation=True)
    return torch.tensor(found["input_ids"])
