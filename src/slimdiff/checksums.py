"""Checksums of weights, exact and the same on every device.

Weights are told apart bit for bit: every parameter and buffer is summed as 64-bit integers, each
times an odd number that its place gives it. Such sums are exact, so they do not depend on the
device, the threads or the memory layout, and a changed, moved or negated number changes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PIECE = 1 << 17
"""Integers of 64 bits that are summed at a time: as many as stay in a processor's cache."""


def weights_digest(module: nn.Module) -> str:
    """Hexadecimal digest of every parameter and buffer: names, shapes, dtypes and bits."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return tensors_digest({name: t for name, t in named if "cache" not in name.split(".")[-1]})


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal digest of tensors by name; of one without data (on `meta`), its shape counts."""
    return digests(tensors)["bits"]


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Digests of tensors by name, each looked up once.

    Returns:
        `kinds`: of names, dtypes and shapes; `bits`: of these and the numbers.
    """
    factors: dict[torch.device, Tensor] = {}
    names: list[list[Any]] = []
    sums: list[Tensor] = []
    with torch.no_grad():
        for name in sorted(tensors):
            for part in _plain(tensors[name]):
                names.append([name.replace("_orig_mod.", ""), str(part.dtype), list(part.shape)])
                sums.append(_checksum(part, factors))
    return {"kinds": hashed(names), "bits": hashed([names, _together(sums)])}


def _together(sums: Sequence[Tensor]) -> list[int]:
    """Numbers on several devices, each device asked once."""
    found: dict[int, int] = {}
    for device in {total.device for total in sums}:
        places = [place for place, total in enumerate(sums) if total.device == device]
        values = torch.stack([sums[place] for place in places]).tolist()
        found |= dict(zip(places, values, strict=True))
    return [found[place] for place in range(len(sums))]


def _checksum(tensor: Tensor, factors: dict[torch.device, Tensor]) -> Tensor:
    """The sum of a tensor's 64-bit integers times their places' factors, modulo 2^64; ()."""
    if tensor.is_meta or not tensor.numel():
        return torch.zeros((), dtype=torch.int64)
    if tensor.device.type not in ("cpu", "cuda"):
        tensor = tensor.cpu()
    if tensor.device not in factors:
        factors[tensor.device] = _factors(tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for lanes_n in _lanes(tensor):
        # The upper half is folded into the lower one: the sign of a float is its last bit, whose
        # products would else be equal for all places.
        mixed_n = lanes_n ^ (lanes_n >> 32)
        total = total * 1_000_003 + (mixed_n * factors[tensor.device][: len(lanes_n)]).sum()
    return total


def _lanes(tensor: Tensor) -> Iterator[Tensor]:
    """The bits of a tensor as 64-bit integers, in pieces; the last one is filled up with zeros."""
    bytes_n = tensor.contiguous().flatten().view(torch.uint8)
    for start in range(0, len(bytes_n), 8 * PIECE):
        piece = bytes_n[start : start + 8 * PIECE]
        if len(piece) % 8 or piece.storage_offset() % 8:
            piece = torch.nn.functional.pad(piece, (0, -len(piece) % 8)).clone()
        yield piece.view(torch.int64)


def _factors(device: torch.device) -> Tensor:
    """An odd number for each place in a piece; (PIECE,), the same on every device."""
    places = torch.arange(1, PIECE + 1, dtype=torch.int64, device=device)
    mixed = places * -7046029254386353131
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return (mixed ^ (mixed >> 32)) | 1


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors that one is made of: of a quantised one, its integers and its scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.detach()]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(tensor, name))]


def hashed(value: Any) -> str:
    """Hexadecimal digest of anything that JSON can write."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
