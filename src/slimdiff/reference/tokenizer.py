"""A CLIPTokenizer of a tiny vocabulary, in which every word of a caption is one token."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimdiff.reference.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 20
"""Tokens of a padded caption of a scene; the longest has 16 words."""

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-"


def words() -> list[str]:
    """Every word of a caption of a scene, once."""
    phrases = ["a", "and", "on", "background", *SHAPES, *COLOURS, *BACKGROUNDS, *SIZES, *POSITIONS]
    return list(dict.fromkeys(" ".join(phrases).split()))


@functools.cache
def merges(words: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Byte-pair merges, in order, that make each word one token."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = _apply(ranks, [*word[:-1], word[-1] + "</w>"])
        while len(pieces) > 1:  # a later merge never comes before those of earlier words
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = _apply(ranks, pieces)
    return tuple(ranks)


def _apply(ranks: dict[tuple[str, str], int], pieces: list[str]) -> list[str]:
    """Merge `pieces` as byte-pair encoding does: the pair of lowest rank first."""
    while True:
        pairs = [(ranks[p], i) for i, p in enumerate(zip(pieces, pieces[1:])) if p in ranks]
        if not pairs:
            return pieces
        _, i = min(pairs)
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]


def vocabulary(merged: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Token to index: characters, merged pieces, then the two special tokens."""
    tokens = [*_CHARACTERS, *(c + "</w>" for c in _CHARACTERS)]
    tokens += [first + second for first, second in merged]
    return {token: i for i, token in enumerate(dict.fromkeys([*tokens, START, END]))}


def build_tokenizer(words: Sequence[str], length: int) -> CLIPTokenizer:
    """The tokenizer of captions of `words`, padded to `length` tokens, built in memory."""
    from transformers import CLIPTokenizer

    merged = merges(tuple(words))
    return CLIPTokenizer(
        vocab=vocabulary(merged),
        merges=list(merged),
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=length,
    )


def encode_captions(tokens: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (n, length), padded as pipelines pad them."""
    how = {"padding": "max_length", "max_length": tokens.model_max_length, "truncation": True}
    return torch.tensor(tokens(captions, **how)["input_ids"])


def tokenizer() -> CLIPTokenizer:
    """The tokenizer of scenes."""
    return build_tokenizer(words(), LENGTH)
