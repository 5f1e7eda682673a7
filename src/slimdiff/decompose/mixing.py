"""Mixing: rotations that spread what a head's few strongest directions carry over all of them.

Decompositions order directions by strength: the first channels of a slim head would hold far
larger numbers than any of the dense one did. A rotation of both factors of a product changes
nothing else, q^T k = (R^T q)^T (R^T k), and keeps half precision in the range that it had.
"""

import torch
from torch import Tensor


def even_mix(width: int, like: Tensor) -> Tensor:
    """The orthogonal cosine transform (DCT-II), (width, width): every column mixes all rows.

    Its entries are at most (2 / width)^1/2. Of the dtype and device of `like`.
    """
    row_r = torch.arange(width, dtype=torch.float64, device=like.device)
    angle_rr = (torch.pi * (row_r + 0.5) * row_r.unsqueeze(1)).div(width)
    mix_rr = angle_rr.cos().mul(2**0.5).div(max(width, 1) ** 0.5)
    mix_rr[:1] *= 0.5**0.5
    return mix_rr.to(like.dtype)
