"""Rows: what layers get and put out at a few tokens or pixels of each sample.

Shape letters: `b` samples, `p` places chosen of each, `n` = b p rows, `c` channels, `k` taps.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d


def places_of(layer: Layer, output: Tensor) -> int:
    """Tokens or pixels of one sample in what `layer` puts out."""
    return output[0].numel() // layer.weight.shape[0]


def choose_places(count: int, places: int, samples: int, chance: str) -> Tensor:
    """`count` of `places` for each sample (b, p), without repeats; the same for equal `chance`."""
    seed = int.from_bytes(hashlib.sha256(chance.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(samples, places, generator=generator).argsort(1)
    return order[:, : min(count, places)].sort(1).values


def picked(layer: Layer, tensor: Tensor, places_bp: Tensor) -> Tensor:
    """Rows (n, c) at the places of a tensor of the shape that `layer` puts out."""
    if isinstance(layer, nn.Conv2d):
        tensor_bqc = tensor.flatten(2).mT
    else:
        tensor_bqc = tensor.reshape(len(tensor), -1, tensor.shape[-1])
    index = places_bp.to(tensor.device)[..., None].expand(-1, -1, tensor_bqc.shape[-1])
    return tensor_bqc.gather(1, index).flatten(0, 1)


def input_of(call: tuple[tuple, dict[str, Any]]) -> Tensor:
    """The tensor that enters a linear or convolution."""
    args, kwargs = call
    return args[0] if args else kwargs["input"]


def inputs_at(layer: Layer, call: tuple[tuple, dict[str, Any]], places_bp: Tensor) -> Tensor:
    """Rows (n, i) of what enters `layer` for its outputs at the places, and 1 for its bias.

    `call` are the arguments of its forward. The columns of a convolution are its channels' taps in
    the order of its weight. A fused upsampler's convolution doubles the map first.
    """
    (args, kwargs), x = call, input_of(call)
    if isinstance(layer, nn.Conv2d):
        doubled = bool(kwargs.get("double") or (len(args) > 1 and args[1]))
        rows = _taps(layer, F.interpolate(x, scale_factor=2.0) if doubled else x, places_bp)
    else:
        rows = picked(layer, x, places_bp)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)


def _taps(conv: nn.Conv2d, x_bchw: Tensor, places_bp: Tensor) -> Tensor:
    """Patches (n, c k) of the map under the kernel at the places of its output."""
    (down, right), (tall, wide) = conv.stride, conv.kernel_size
    top, left = (int(side) for side in conv.padding)
    padded = F.pad(x_bchw, (left, left, top, top))
    height, width = padded.shape[2:]
    outputs = (width - conv.dilation[1] * (wide - 1) - 1) // right + 1
    rows_bp, columns_bp = places_bp // outputs * down, places_bp % outputs * right
    taps_k = torch.cartesian_prod(torch.arange(tall), torch.arange(wide))
    y_bpk = rows_bp[..., None] + taps_k[:, 0] * conv.dilation[0]
    x_bpk = columns_bp[..., None] + taps_k[:, 1] * conv.dilation[1]
    index_bq = (y_bpk * width + x_bpk).flatten(1).to(x_bchw.device)
    index = index_bq[:, None].expand(-1, padded.shape[1], -1)
    patches = padded.flatten(2).gather(2, index)
    return patches.unflatten(2, (-1, tall * wide)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def can_be_refit(layer: nn.Module) -> bool:
    """Whether its output is linear in its weight, and its rows are those of `inputs_at`."""
    if isinstance(layer, nn.Conv2d):
        plain = (layer.groups, layer.padding_mode) == (1, "zeros")
        return plain and isinstance(layer.padding, tuple)
    return isinstance(layer, nn.Linear)
