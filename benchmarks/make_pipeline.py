"""Write a whole Stable Diffusion 1.5-shaped pipeline folder with random weights.

    python benchmarks/make_pipeline.py runs/sd15-random

It holds what a downloaded one holds, apart from sense: the published configurations of UNet,
autoencoder and text encoder, and a tokenizer of single characters.
"""

from __future__ import annotations

import argparse
import json
import string
import tempfile
from pathlib import Path
from typing import Any

import torch

from shapes import SHAPES, build


def tokenizer() -> Any:
    """A CLIP tokenizer whose vocabulary is the printable characters."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)


def main() -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    words = tokenizer()
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=build(SHAPES["sd15"]),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
