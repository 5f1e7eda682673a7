"""Decomposition of one linear or convolution into two, with a rank between them.

A modulation makes shifts, scales and gates of one vector per image and step: the moment of its
input has few directions. A projection of the residual stream is known by the moment of its output.

Shape letters: `o` output, `i` input channels, `k` = min(o, i), `r` rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.decompose.decomposition import Decomposition
from slimdiff.decompose.linalg import checked_moment, symmetric_root, tail_sums
from slimdiff.decompose.mixing import even_mix

BALANCE = 1.25
"""What the second factor, and with it the channels of the rank, may take over from the first one.

Orthonormal columns hold numbers up to twice as large as the weights of some shortcuts."""


@dataclass(frozen=True, eq=False)
class LowRank(Decomposition):
    """Low-rank factors; `maps` gives "weight" (o, r) and "projection" (r, i).

    W' = weight projection, rotated between them so that no channel of the rank holds far more than
    another (see `mixing`). At full width `projection` is missing: nothing is factored.
    """

    weight_oi: Tensor
    basis_ok: Tensor

    def _identity(self) -> dict[str, Tensor]:
        return {"weight": self.weight_oi}

    def _slim(self, width: int) -> dict[str, Tensor]:
        basis_or = self.basis_ok[:, :width] @ even_mix(width, self.basis_ok)
        projection_ri = basis_or.mT @ self.weight_oi
        largest, other = basis_or.abs().max(), projection_ri.abs().max().clamp_min(1e-300)
        share = (largest / other).sqrt().clamp(1.0, BALANCE)
        return {"weight": basis_or / share, "projection": projection_ri * share}


def modulation(weight_oi: Tensor, moment_ii: Tensor) -> LowRank:
    """Minimise E|W x - U U^T W x|^2 over orthonormal U (o, r), for every r at once.

    U spans the leading left singular vectors of W M^1/2 (Eckart-Young). Inputs that calibration
    never saw lose only what they put outside of that span, so no direction counts as missing.

    Args:
        weight_oi: (o, i) weight of the linear.
        moment_ii: (i, i) moment of its input.

    Raises:
        ValueError: shapes disagree, or a value is not finite.
    """
    weight_oi = _checked_weight(weight_oi)
    outputs, inputs = weight_oi.shape
    width = min(outputs, inputs)
    root_ii, _ = symmetric_root(checked_moment(moment_ii, "moment_ii", (inputs, inputs)))
    product_oi = weight_oi @ root_ii
    # Eigenvectors of the smaller Gram matrix take the place of a singular value decomposition.
    if inputs <= outputs:
        energy_k, right_ik = torch.linalg.eigh(product_oi.mT @ product_oi)
        left_ok = torch.linalg.qr(product_oi @ right_ik.flip(-1)).Q
    else:
        energy_k, left_ok = torch.linalg.eigh(product_oi @ product_oi.mT)
        left_ok = left_ok.flip(-1)
    errors = tail_sums(energy_k.flip(-1).clamp_min(0.0))
    return LowRank(errors, 0, weight_oi, left_ok[:, :width])


def projection(weight_oi: Tensor, moment_oo: Tensor, prior: float = 0.0) -> LowRank:
    """Minimise E|y - U U^T y|^2 over orthonormal U (o, r), y = W x, for every r at once.

    U spans the leading eigenvectors of the moment: no map of rank r from x to y has less error,
    since y is linear in x (reduced-rank regression; Izenman, 1975).

    Args:
        weight_oi: (o, i) weight of the layer; i counts all taps of a convolution.
        moment_oo: (o, o) moment of what it puts out, without its bias.
        prior: share of the moment that white inputs of as much energy would give, W W^T, mixed in:
            of few samples the moment knows few directions, and the others are not empty.

    Raises:
        ValueError: shapes disagree, a value is not finite, or `prior` is not within 0 and 1.
    """
    if not 0 <= prior <= 1:
        raise ValueError(f"prior must be within 0 and 1, got {prior}")
    weight_oi = _checked_weight(weight_oi)
    outputs, width = weight_oi.shape[0], min(weight_oi.shape)
    moment_oo = checked_moment(moment_oo, "moment_oo", (outputs, outputs))
    white_oo = weight_oi @ weight_oi.mT
    scale = moment_oo.trace() / white_oo.trace().clamp_min(1e-300)
    energy_o, basis_oo = torch.linalg.eigh(torch.lerp(moment_oo, scale * white_oo, prior))
    errors = tail_sums(energy_o.flip(-1).clamp_min(0.0)[:width])
    return LowRank(errors, 0, weight_oi, basis_oo.flip(-1)[:, :width].contiguous())


def _checked_weight(weight_oi: Tensor) -> Tensor:
    """The weight in float64; refused if it is no finite matrix."""
    if weight_oi.ndim != 2 or not torch.isfinite(weight_oi).all():
        raise ValueError(f"weight_oi must be finite and (o, i), got {tuple(weight_oi.shape)}")
    return weight_oi.double()
