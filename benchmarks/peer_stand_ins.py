"""Tokenizers and configs that diffusers' tests fetch, made here: no hub is asked."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest

START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer() -> Any:
    """One token per letter; 77 at most, as CLIP has."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    pieces = [START, END, *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(
        vocab={piece: place for place, piece in enumerate(pieces)},
        merges=[],
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=77,
    )


def t5_tokenizer() -> Any:
    """One token per letter."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_letters]
    vocabulary = [(piece, 0.0 if place < 3 else -1.0) for place, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def t5_config() -> Any:
    """Text embeddings of 32 channels."""
    from transformers import T5Config

    return T5Config(
        vocab_size=128,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        is_encoder_decoder=True,
        decoder_start_token_id=0,
    )


def t5_encoder() -> Any:
    """A random text encoder."""
    import torch
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    return T5EncoderModel(t5_config()).eval()


STAND_INS: dict[tuple[str, str], Callable[[], Any]] = {
    ("CLIPTokenizer", "hf-internal-testing/tiny-random-clip"): clip_tokenizer,
    ("AutoTokenizer", "hf-internal-testing/tiny-random-t5"): t5_tokenizer,
    ("AutoConfig", "hf-internal-testing/tiny-random-t5"): t5_config,
    ("T5EncoderModel", "hf-internal-testing/tiny-random-t5"): t5_encoder,
}


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Have `from_pretrained` of transformers give these, and everything else as before."""
    import transformers

    for name in {name for name, _ in STAND_INS}:
        cls = getattr(transformers, name)
        patch.setattr(cls, "from_pretrained", _from_pretrained(name, cls.from_pretrained))


def _from_pretrained(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(path: Any, *args: Any, **options: Any) -> Any:
        made = STAND_INS.get((name, str(path)))
        return made() if made else own(path, *args, **options)

    return from_pretrained
