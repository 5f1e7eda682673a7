"""Distances between two sets of images, in the features of any module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.errors import SlimdiffError
from slimdiff.evaluate.features import Features

BATCH = 32


def features_of(images_nchw: Tensor, features: Features) -> Tensor:
    """Features (n, d) float64 of images (n, 3, h, w) from 0 to 1, in batches."""
    return torch.cat([features(part) for part in images_nchw.split(BATCH)]).double()


def frechet(a_nd: Tensor, b_nd: Tensor) -> float:
    """Fréchet distance of two sets of features, each taken as a Gaussian (Heusel et al., 2017).

    It falls as the sets grow: compare only distances of equally many images.

    Raises:
        SlimdiffError: fewer than two images, or torchmetrics is not installed.
    """
    if min(len(a_nd), len(b_nd)) < 2:
        raise SlimdiffError("a Fréchet distance needs at least two images in each set")
    identity = nn.Identity()
    identity.num_features = a_nd.shape[1]  # type: ignore[assignment]  # torchmetrics reads it
    metric = _torchmetrics("fid").FrechetInceptionDistance(feature=identity).set_dtype(a_nd.dtype)
    metric.update(a_nd, real=True)
    metric.update(b_nd, real=False)
    return float(metric.compute())


def kernel(a_nd: Tensor, b_nd: Tensor) -> float:
    """Unbiased squared MMD with the cubic kernel of KID (Binkowski et al., 2018) over all images.

    No image is compared with itself or with its counterpart of the same seed (Gretton et al., 2012,
    lemma 6): the sets are paired, and the estimator of independent sets would be far below zero.

    Raises:
        SlimdiffError: fewer than two images, or sets of different sizes.
    """
    n, d = a_nd.shape
    if len(b_nd) != n or n < 2:
        raise SlimdiffError(
            f"a kernel distance needs two equal sets of at least two images, got {n} and "
            f"{len(b_nd)}"
        )

    def off_diagonal(x_nd: Tensor, y_nd: Tensor) -> Tensor:
        k_nn = (x_nd @ y_nd.mT / d + 1) ** 3
        return (k_nn.sum() - k_nn.trace()) / (n * (n - 1))

    both = off_diagonal(a_nd, a_nd) + off_diagonal(b_nd, b_nd)
    return float(both - 2 * off_diagonal(a_nd, b_nd))


def _torchmetrics(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"torchmetrics.image.{name}")
    except ImportError as error:
        raise SlimdiffError(
            "image distances need torchmetrics: pip install 'slimdiff[metrics]'"
        ) from error
