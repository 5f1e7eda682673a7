"""The world of emoji: glyphs with their Unicode names on lit backgrounds.

All that is known of where glyphs, captions and trained networks lie is in `EmojiSource`; point
`source` at another one when emoji lie elsewhere.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from generalisation.worlds import SHARD, tokens_of
from measuring import HERE

CACHE = HERE / "cache" / "generalisation"
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 240),
    "black": (18, 18, 20),
    "navy": (24, 38, 92),
    "teal": (20, 120, 118),
    "pink": (250, 190, 205),
    "yellow": (252, 214, 90),
    "green": (60, 140, 70),
    "violet": (122, 84, 180),
}
SIDE, CHUNK = 64, 256


@dataclass(frozen=True)
class EmojiSource:
    """A folder with `glyphs.npz` (WebP images, their sizes, styles and names) and a `pipeline`."""

    folder: Path

    @property
    def pipeline(self) -> Path:
        """The trained pipeline whose autoencoder, text encoder and tokenizer are taken."""
        return self.folder / "pipeline"

    @cached_property
    def _file(self) -> Any:
        return np.load(self.folder / "glyphs.npz")

    @cached_property
    def names(self) -> list[tuple[str, str]]:
        """Style and name of every glyph."""
        return [(style, name) for style, name in json.loads(self._file["meta"].tobytes())]

    def glyph(self, index: int) -> Tensor:
        """A glyph's premultiplied colours and its opacity: (4, 64, 64), from 0 to 1."""
        from PIL import Image

        sizes, blob = self._file_arrays
        end = int(sizes[: index + 1].sum())
        packed = blob[end - int(sizes[index]) : end].tobytes()
        image = torch.from_numpy(np.array(Image.open(io.BytesIO(packed)).convert("RGBA")))
        rgba = image.float().div(255).permute(2, 0, 1)
        return torch.cat([rgba[:3] * rgba[3:], rgba[3:]])

    @cached_property
    def _file_arrays(self) -> tuple[Any, Any]:
        return self._file["sizes"], self._file["blob"]

    def pairs(self, split: str, one_in: int = 1) -> list[tuple[int, int]]:
        """Glyph and background of every picture of `train`, `calibration` or `test`.

        Every eighth pair is held out for tests, one of each glyph. Calibration prompts are pairs
        that are trained on. Of the glyphs, one in so many is used.
        """
        glyphs = range(0, len(self.names), one_in)
        every = [(g, b) for g in glyphs for b in range(len(BACKGROUNDS))]
        return [(g, b) for g, b in every if ((5 * g + b) % 8 == 7) == (split == "test")]

    def caption(self, glyph: int, background: int) -> str:
        """What a pair is called."""
        style, name = self.names[glyph]
        return f"{style} {name} on {list(BACKGROUNDS)[background]} background"


@cache
def source() -> EmojiSource:
    """Where emoji come from: $SLIMDIFF_EMOJI, or `emoji` in the cache."""
    return EmojiSource(Path(os.environ.get("SLIMDIFF_EMOJI", CACHE / "emoji")))


@dataclass(frozen=True)
class EmojiWorld:
    """Glyphs of three styles; networks of the emoji reference.

    Attributes:
        one_in: of the glyphs, one in so many is drawn: a small model learns all of them too slowly.
    """

    one_in: int = 3
    name, latent_channels, guidance, shards = "emoji", 8, 2.0, 3

    def vae(self) -> Any:
        """The autoencoder of the emoji reference."""
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(source().pipeline, subfolder="vae")

    def scaling(self) -> float:
        """As that pipeline has it."""
        return float(self.vae().config.scaling_factor)

    def text_encoder(self, kind: str, part: int) -> Any | None:
        """That of the reference; a second one, of SD3, has to be trained."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        if part == 1:
            return None
        folder = source().pipeline / "text_encoder"
        trained = CLIPTextModel.from_pretrained(folder)
        if kind == "unet":
            return trained
        pooled = CLIPTextModelWithProjection(trained.config)
        missing = pooled.load_state_dict(_renamed(trained, pooled), strict=False)
        assert missing.missing_keys == ["text_projection.weight"], missing
        torch.nn.init.eye_(pooled.text_projection.weight)
        return pooled

    def tokenizer(self) -> Any:
        """A token a word, padded to 24."""
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(source().pipeline / "tokenizer")

    def fill(self, folder: Path, index: int) -> None:
        """Random training pairs at random places and sizes, the same for every model."""
        path = folder / f"shard-{index:04d}.safetensors"
        if path.exists():
            return
        generator = torch.Generator().manual_seed(index)
        pairs = source().pairs("train", self.one_in)
        picks = torch.randint(len(pairs), (SHARD,), generator=generator).tolist()
        chosen = [pairs[pick] for pick in picks]
        vae = self.vae().eval().to(memory_format=torch.channels_last)
        parts = [
            _latents(vae, chosen[start : start + CHUNK], generator)
            for start in range(0, SHARD, CHUNK)
        ]
        shard = {
            "latents": torch.cat(parts).mul(self.scaling()).half().contiguous(),
            "tokens": tokens_of(self, [source().caption(*pair) for pair in chosen]),
            "occupied": torch.ones(SHARD, 4, dtype=torch.bool),
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(shard, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def prompts(self, split: str, count: int) -> list[str]:
        """Captions of random pairs of a split."""
        pairs = source().pairs(split, self.one_in)
        order = np.random.default_rng(11).permutation(len(pairs))
        found = dict.fromkeys(source().caption(*pairs[i]) for i in order)
        return list(found)[:count]


def _renamed(trained: Any, pooled: Any) -> dict[str, Tensor]:
    """The weights of a CLIPTextModel by the names that they have in one with a projection."""
    state = trained.state_dict()
    own = [name for name in pooled.state_dict() if name != "text_projection.weight"]
    if set(own) == set(state):
        return state
    return {name: state[name.removeprefix("text_model.")] for name in own}


@torch.no_grad()
def _latents(vae: Any, pairs: list[tuple[int, int]], generator: torch.Generator) -> Tensor:
    """Latent means of pictures of pairs: (n, 8, 16, 16), float32."""
    pixels = draw(pairs, generator).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        return vae.encode(pixels).latent_dist.mean.float()


def draw(pairs: list[tuple[int, int]], generator: torch.Generator) -> Tensor:
    """Glyphs on lit backgrounds, shifted and scaled by chance: (n, 3, 64, 64), from -1 to 1."""
    n = len(pairs)
    glyphs = torch.stack([source().glyph(g) for g, _ in pairs])
    palette = torch.tensor(list(BACKGROUNDS.values())) / 255
    ground = palette[[b for _, b in pairs]][:, :, None, None]
    scale = 0.72 + 0.2 * torch.rand(n, generator=generator)
    shift = (2 * torch.rand(n, 2, generator=generator) - 1) * (1 - scale)[:, None]
    light = 2 * torch.rand(n, 2, generator=generator) - 1
    axis = torch.linspace(-1, 1, SIDE)
    ramp = light[:, 0, None, None] * axis[:, None] + light[:, 1, None, None] * axis
    placed = _placed(glyphs, scale, shift)
    lit = (ground * (1 + 0.12 * ramp[:, None])).clamp(0, 1)
    return (placed[:, :3] + lit * (1 - placed[:, 3:])).clamp(0, 1) * 2 - 1


def _placed(glyphs: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Images (n, 4, 64, 64) at `scale` (n,) of their size, their centres at `shift` (n, 2)."""
    matrix = torch.zeros(len(glyphs), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / scale
    matrix[:, :, 2] = -shift / scale[:, None]
    grid = F.affine_grid(matrix, list(glyphs.shape), align_corners=False)
    return F.grid_sample(glyphs, grid, align_corners=False, padding_mode="zeros")
