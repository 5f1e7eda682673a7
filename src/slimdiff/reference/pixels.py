"""Images of any common kind as pixels, for judges."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SIDE = 64
"""Height and width of every reference's images in pixels."""


def as_pixels(images: object) -> Tensor:
    """Images of any common kind, one or many, as (n, 64, 64, 3) from 0 to 1.

    Arrays (n, 64, 64, 3) of uint8 or of floats from 0 to 1, or PIL images.
    """
    array = np.stack([np.asarray(i) for i in images])  # type: ignore[attr-defined]  # images or arrays
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(f"images are {array.shape}; expected (n, {SIDE}, {SIDE}, 3)")
    scale = 255 if array.dtype == np.uint8 else 1
    return torch.from_numpy(array.astype(np.float32) / scale)
