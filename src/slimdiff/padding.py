"""Padding: tokens of a call that no output depends on.

A denoiser is told of its text's padding by a mask, which its family names. Padded keys and values
count for nothing where the layer is given the mask and its processor keeps to it; where it is not,
as in self-attention over text states, or a processor of one's own, they count like others.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.calls import bound, signature_of
from slimdiff.families import family_of
from slimdiff.groups import ADDED, LAYERS, SECOND_STREAM, Group, stem

MASKS = ("attention_mask", "encoder_attention_mask", "encoder_hidden_states_mask")
"""What attention layers call the mask of the tokens that they look at."""

KNOWN = ("diffusers", "slimdiff", "slim_denoiser")
"""Packages whose processors keep to a mask that they take."""

LOWEST = -1e3
"""Less than this, added to the products of queries and keys, leaves nothing of a token."""


@dataclass(frozen=True, eq=False)
class Counting:
    """The tokens of a batch that count.

    Attributes:
        mask_bt: (batch, tokens) bool.
        index_n: their places in the flattened batch, (n,).
    """

    mask_bt: Tensor
    index_n: Tensor

    @classmethod
    def of(cls, mask: Tensor | None) -> Counting | None:
        """What a mask (batch, tokens) of ones and zeros lets count; None where that is all.

        A bias (batch, 1, tokens) is a mask too. Where all tokens of a sample are masked, attention
        is over all of them alike: they count.
        """
        if mask is None or mask.ndim not in (2, 3) or (mask.ndim == 3 and mask.shape[1] != 1):
            return None
        is_bias = mask.ndim == 3 and mask.dtype != torch.bool
        mask_bt = (mask > LOWEST if is_bias else mask.bool()).flatten(0, -2)
        mask_bt = mask_bt | ~mask_bt.any(1, keepdim=True)
        index_n = mask_bt.flatten().nonzero().squeeze(1)
        return None if len(index_n) == mask_bt.numel() else cls(mask_bt, index_n)

    def fits(self, x: Tensor) -> bool:
        """Whether x (batch, tokens, ...) is of these tokens."""
        return x.ndim == 3 and x.shape[:2] == self.mask_bt.shape

    def pick(self, x_bti: Tensor) -> Tensor:
        """The tokens of all samples that count, as one sample: (1, n, i)."""
        return x_bti.flatten(0, 1).index_select(0, self.index_n.to(x_bti.device)).unsqueeze(0)


class Padding:
    """Which tokens count in the layers of a denoiser, call by call.

    Attributes:
        handles: of its hooks, for the caller to remove.
    """

    def __init__(self, denoiser: nn.Module, groups: Sequence[Group]) -> None:
        family = family_of(denoiser)
        self.whole = family.text
        self._mask = family.mask or ("attention_mask" if family.text else "")
        self._text: Counting | None = None
        self._joined: dict[tuple, Counting | None] = {}
        self._masked: set[str] = set()  # layers that were given a mask in this call
        self._crossing: set[str] = set()  # layers whose keys and values are of the text
        layers = {group.layer for group in groups if LAYERS[group.kind] == "attention"}
        self.handles = []
        if self._mask and not self.whole:
            self._of_block = {g.layer: g.block for g in groups if g.layer in layers}
            modules = {path: denoiser.get_submodule(path) for path in sorted(layers)}
            self._all_keep_to_it = all(map(_keeps_to_masks, modules.values()))
            self.handles = [
                module.register_forward_pre_hook(self._noting(path, module), with_kwargs=True)
                for path, module in modules.items()
            ]

    def begin(self, arguments: Mapping[str, Any]) -> Counting | None:
        """A call begins; returns what counts in all layers of a text encoder."""
        found = Counting.of(arguments.get(self._mask)) if self._mask else None
        self._text = None if self.whole else found
        self._joined.clear()
        self._masked.clear()
        self._crossing.clear()
        return found if self.whole else None

    def of(self, group: Group, role: str, x: Tensor) -> Counting | None:
        """What counts of x (batch, tokens, channels) at a role of a group; None: all of it."""
        if self._text is None or not self._text.fits(x):
            return None
        if group.kind == "feed_forward":
            blocks = {self._of_block[layer] for layer in self._masked}
            return self._text if group.text and self._joint(group.block in blocks) else None
        if role.endswith(ADDED):
            return self._text if self._joint(group.layer in self._masked) else None
        of_text = stem(role) in ("k", "v") and group.layer in self._crossing
        return self._text if of_text and group.layer in self._masked else None

    def joined(self, parts: Sequence[Counting | None], streams: Sequence[Tensor]) -> Any:
        """What counts of the streams of a joint attention layer, one after the other."""
        if all(part is None for part in parts):
            return None
        key = tuple((part is None, x.shape[1]) for part, x in zip(parts, streams, strict=True))
        if key not in self._joined:
            masks = [
                x.new_ones(x.shape[:2], dtype=torch.bool)
                if part is None
                else part.mask_bt.to(x.device)
                for part, x in zip(parts, streams, strict=True)
            ]
            self._joined[key] = Counting.of(torch.cat(masks, 1))
        return self._joined[key]

    def _joint(self, masked: bool) -> bool:
        """Text states that go on to other layers count if any of these looks at padding."""
        return masked and self._all_keep_to_it

    def _noting(self, path: str, layer: nn.Module) -> Any:
        signature, keeps = signature_of(layer), _keeps_to_masks(layer)
        joint = getattr(layer, SECOND_STREAM["k"], None) is not None

        def note(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = bound(signature, args, kwargs)
            if keeps and any(given.get(name) is not None for name in MASKS):
                self._masked.add(path)
            if given.get("encoder_hidden_states") is not None and not joint:
                self._crossing.add(path)

        return note


def _keeps_to_masks(layer: nn.Module) -> bool:
    """Whether an attention layer's processor is known, and takes a mask."""
    processor: Any = getattr(layer, "processor", None)
    if not type(processor).__module__.startswith(KNOWN):
        return False
    return bool(set(MASKS) & set(inspect.signature(processor.__call__).parameters))
