"""Figures about images: likeness to the dense model's, and intervals of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimdiff.errors import SlimdiffError

if TYPE_CHECKING:
    from PIL.Image import Image

IDENTICAL_DB = 100.0  # PSNR of equal images, above what 8 bits can otherwise reach


def psnr(images: Sequence[Any], references: Sequence[Any]) -> float:
    """Mean over image pairs of the peak signal-to-noise ratio in dB; equal images count as 100.

    Raises:
        SlimdiffError: different numbers or sizes of images, or torchmetrics is not installed.
    """
    measure = _torchmetrics("peak_signal_noise_ratio")
    a_nchw, b_nchw = _pairs(images, references)
    values_n = measure(a_nchw, b_nchw, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return float(values_n.clamp_max(IDENTICAL_DB).mean())


def ssim(images: Sequence[Any], references: Sequence[Any]) -> float:
    """Mean over image pairs of the structural similarity (at most 1).

    Raises:
        SlimdiffError: different numbers or sizes of images, or torchmetrics is not installed.
    """
    measure = _torchmetrics("structural_similarity_index_measure")
    return float(measure(*_pairs(images, references), data_range=1.0, reduction="none").mean())


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share: 95 % at the default `z`.

    Raises:
        SlimdiffError: not 0 <= successes <= trials with at least one trial.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise SlimdiffError(f"{successes} of {trials}: expected 0 to n successes of n >= 1 trials")
    share, square = successes / trials, z * z / trials
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def image_tensor(images: Sequence[Image]) -> Tensor:
    """PIL images of one size as (n, 3, height, width) float32 from 0 to 1."""
    import numpy as np

    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _pairs(images: Sequence[Image], references: Sequence[Image]) -> tuple[Tensor, Tensor]:
    sizes = ({image.size for image in group} for group in (images, references))
    if len(images) != len(references) or not images or len(set().union(*sizes)) != 1:
        raise SlimdiffError(
            f"{len(images)} images against {len(references)}: expected equally many, at least one, "
            f"all of one size"
        )
    return image_tensor(images), image_tensor(references)


def _torchmetrics(name: str) -> Any:
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise SlimdiffError(
            "PSNR and SSIM need torchmetrics: pip install 'slimdiff[metrics]'"
        ) from error
    return getattr(image, name)
