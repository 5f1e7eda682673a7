"""A CLIPTokenizer of a tiny vocabulary, in which every word of a caption is one token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from slimdiff.reference.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 20
"""Tokens of a padded caption; the longest has 16 words."""

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-"


def words() -> list[str]:
    """Every word of a caption, once."""
    phrases = ["a", "and", "on", "background", *SHAPES, *COLOURS, *BACKGROUNDS, *SIZES, *POSITIONS]
    return list(dict.fromkeys(" ".join(phrases).split()))


def merges() -> list[tuple[str, str]]:
    """Byte-pair merges, in order, that make each word one token."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words():
        pieces = _apply(ranks, [*word[:-1], word[-1] + "</w>"])
        while len(pieces) > 1:  # a later merge never comes before those of earlier words
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = _apply(ranks, pieces)
    return list(ranks)


def _apply(ranks: dict[tuple[str, str], int], pieces: list[str]) -> list[str]:
    """Merge `pieces` as byte-pair encoding does: the pair of lowest rank first."""
    while True:
        pairs = [(ranks[p], i) for i, p in enumerate(zip(pieces, pieces[1:])) if p in ranks]
        if not pairs:
            return pieces
        _, i = min(pairs)
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]


def vocabulary() -> dict[str, int]:
    """Token to index: characters, merged pieces, then the two special tokens."""
    tokens = [*_CHARACTERS, *(c + "</w>" for c in _CHARACTERS)]
    tokens += [first + second for first, second in merges()]
    return {token: i for i, token in enumerate(dict.fromkeys([*tokens, START, END]))}


def write_tokenizer(folder: Path) -> None:
    """Write vocab.json and merges.txt into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def tokenizer() -> CLIPTokenizer:
    """The tokenizer, built in memory."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=vocabulary(),
        merges=merges(),
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=LENGTH,
    )
