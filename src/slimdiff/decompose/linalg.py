"""Factors of second moments that stay finite whatever the moment.

Shape letters: `n` the size of a moment, `o` output channels, `s` kept and `t` removed entries.
A leading `...` is a batch, for instance of heads. All functions work in float64.
"""

from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 1e-6
"""Ridge of least-squares refits, as a share of the moment's mean diagonal.

It exceeds the rounding of moments that were stored as float32, and is far below their entries.
"""

FLOOR = 1e-12
"""Energies below this share of the largest are rounding: that direction never occurred."""

_TINY = 1e-100  # stands in for the scale of an all-zero moment; its square is still a float64
_STRIP = 640  # rows or columns handled at once where a matrix is half zeros


def checked_moment(moment: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """`moment` as float64.

    Raises:
        ValueError: `moment` is not of `shape`, or holds an infinity or NaN.
    """
    if tuple(moment.shape) != shape:
        raise ValueError(f"{name} is {tuple(moment.shape)}, expected {shape}")
    if not torch.isfinite(moment).all():
        raise ValueError(f"{name} holds infinities or NaN; was the model calibrated in float16?")
    return moment.double()


def symmetric_root(c_nn: Tensor) -> tuple[Tensor, int]:
    """Symmetric square root (..., n, n) of `c_nn` (..., n, n), and its missing directions.

    Eigenvalues below `FLOOR` times the largest count as zero. The second value is the number of
    such eigenvalues in the worst matrix of the batch.
    """
    values_n, vectors_nn = torch.linalg.eigh(c_nn)
    seen_n = values_n > FLOOR * values_n.amax(-1, keepdim=True).clamp_min(_TINY)
    root_n = torch.where(seen_n, values_n, 0.0).clamp_min(0.0).sqrt()
    missing = int((~seen_n).sum(-1).max())
    return vectors_nn * root_n.unsqueeze(-2) @ vectors_nn.mT, missing


def ridge_of(c_nn: Tensor, damping: float) -> Tensor:
    """`damping` times the mean diagonal of `c_nn` (..., n, n), shape (...), never zero or less.

    Raises:
        ValueError: `damping` is negative.
    """
    if damping < 0:
        raise ValueError(f"damping must not be negative, got {damping}")
    return damping * c_nn.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(_TINY)


def damped(c_nn: Tensor, damping: float) -> Tensor:
    """`c_nn` (..., n, n) plus `damping` times its mean diagonal times the identity; a copy."""
    result_nn = c_nn.clone()
    result_nn.diagonal(dim1=-2, dim2=-1).add_(ridge_of(c_nn, damping).unsqueeze(-1))
    return result_nn


def definite_damping(c_nn: Tensor, damping: float) -> float:
    """The least of `damping` times 1, 10, ... 1000 under which `c_nn` (n, n) is positive definite.

    Sums in low precision leave a moment of few tokens with eigenvalues below zero, by more the
    larger the moment is; a ridge that outweighs them keeps all that follows a matter of Cholesky.
    """
    for factor in (1, 10, 100):
        if not bool(torch.linalg.cholesky_ex(damped(c_nn, factor * damping)).info.any()):
            return factor * damping
    return 1000 * damping


def triangular_factor(c_nn: Tensor) -> Tensor:
    """Lower-triangular L (..., n, n) with positive diagonal and L L^T = `c_nn` (..., n, n).

    By Cholesky. Where that fails (a singular, zero or slightly indefinite matrix), eigenvalues
    are raised to `FLOOR` times the largest diagonal entry; L L^T differs by no more than that.
    """
    factor_nn, failed = torch.linalg.cholesky_ex(c_nn)
    if not bool(failed.any()):
        return factor_nn
    values_n, vectors_nn = torch.linalg.eigh(c_nn)
    floor = _floor(c_nn.diagonal(dim1=-2, dim2=-1)).unsqueeze(-1)
    root_nn = vectors_nn * torch.maximum(values_n, floor).sqrt().unsqueeze(-2)
    upper_nn = torch.linalg.qr(root_nn.mT, mode="r").R
    signs_n = torch.where(upper_nn.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return (upper_nn * signs_n.unsqueeze(-1)).mT


def raised_factor(
    make: Callable[[], Tensor], mean_diagonal: float, damping: float
) -> tuple[Tensor, float]:
    """Lower-triangular L with L L^T = `make()` + `damping` * `mean_diagonal` * I, and `damping`.

    Where that is not positive definite, ten times the damping is tried, and so on. `make` gives
    the (n, n) matrix afresh, because it is factored in place.
    """
    while True:
        c_nn = make()
        c_nn.diagonal().add_(damping * max(mean_diagonal, _TINY))
        factor_nn, failed = _factored_(c_nn)
        if not failed:
            return factor_nn, damping
        damping *= 10


def _factored_(c_nn: Tensor) -> tuple[Tensor, bool]:
    """Cholesky over the columns of a symmetric matrix, without a copy of it on a CPU."""
    if c_nn.device.type != "cpu":
        factor_nn, failed = torch.linalg.cholesky_ex(c_nn)
        return factor_nn, bool(failed)
    columns_nn, info = c_nn.mT, torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(columns_nn, out=(columns_nn, info))
    return columns_nn, bool(info)


def inverse_root_(l_nn: Tensor) -> Tensor:
    """L^-1 (n, n), written over the lower-triangular `l_nn` (n, n) in strips that skip zeros.

    A strip of columns needs only itself and what stands to its right.
    """
    n = l_nn.shape[-1]
    for start, stop in _strips(n):
        eye_nk = torch.eye(n - start, stop - start, dtype=l_nn.dtype, device=l_nn.device)
        columns_nk = torch.linalg.solve_triangular(l_nn[start:, start:], eye_nk, upper=False)
        l_nn[start:, start:stop] = columns_nk
    return l_nn


def inverse_of_factored_(l_nn: Tensor) -> Tensor:
    """(L L^T)^-1 (n, n), written over `l_nn`; faster than `torch.cholesky_inverse`.

    With R = L^-1 it is R^T R, whose strip of rows needs only the rows of R from there on.
    """
    inverse_nn = inverse_root_(l_nn)
    for start, stop in _strips(l_nn.shape[-1]):
        inverse_nn[start:stop, :stop] = (
            inverse_nn[start:, start:stop].mT @ inverse_nn[start:, :stop]
        )
        inverse_nn[:start, start:stop] = inverse_nn[start:stop, :start].mT
    return inverse_nn


def missing_directions_(l_nn: Tensor, ridge: Tensor) -> int:
    """Number of entries which those before them determine, where L L^T = C + ridge I.

    `l_nn` is overwritten.

    Row j of L^-1 is (-b, 1) / L_jj with b the prediction of entry j from those before it, and
    L_jj^2 is the variance that is left plus ridge |(-b, 1)|^2. So ridge |row j|^2 is the share
    of the ridge in what is left; an entry counts from one half.
    """
    floor = _floor(l_nn.square().sum(-1))
    share_n = inverse_root_(l_nn).square_().sum(-1) * torch.maximum(ridge, floor)
    return int((share_n >= 0.5).sum())


def refit_coupling(c_nn: Tensor, kept: int) -> Tensor:
    """Least-squares weights (..., t, s) that predict the removed entries from the kept ones.

    `c_nn` (..., n, n) is damped, and its first `kept` entries are the kept ones. The best linear
    prediction of x_t from x_s is B x_s with B = C_ts C_ss^-1, hence w_s' = w_s + w_t B
    (SlimDiff, arXiv 2509.21498, Nystrom refit of the feed-forward).
    """
    l_ss = triangular_factor(c_nn[..., :kept, :kept])
    return torch.cholesky_solve(c_nn[..., :kept, kept:], l_ss).mT


def tail_sums(energy_n: Tensor) -> Tensor:
    """Sums (n + 1) of the entries from each index on; the last is exactly zero."""
    tails_n = energy_n.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([tails_n, tails_n.new_zeros(1)])


def refit_curve(w_on: Tensor, l_nn: Tensor) -> Tensor:
    """E|W x - W' x_kept|^2 (n + 1) when the first k entries are kept and W' is the best there is.

    With L L^T = E[x x^T], what the first k entries cannot predict of W x has the energy of
    columns k, k + 1, ... of W L.
    """
    n = l_nn.shape[-1]
    energies = [
        torch.linalg.vector_norm(w_on[:, start:] @ l_nn[start:, start:stop], dim=-2).square()
        for start, stop in _strips(n)
    ]
    return tail_sums(torch.cat(energies) if energies else l_nn.new_zeros(0))


def truncation_curve(w_on: Tensor, c_nn: Tensor) -> Tensor:
    """E|W_removed x_removed|^2 (n + 1) when the first k entries are kept with their old weights.

    It may rise with k: two removed entries can cancel each other.
    """
    energy_nn = (w_on.mT @ w_on).mul_(c_nn)
    own_n = energy_nn.diagonal()
    return tail_sums(2 * energy_nn.triu().sum(-1) - own_n)


def _floor(diagonal_n: Tensor) -> Tensor:
    """The energy (...) that counts as rounding in a matrix with this diagonal (..., n)."""
    return FLOOR * diagonal_n.amax(-1).clamp_min(_TINY)


def _strips(n: int) -> list[tuple[int, int]]:
    return [(start, min(start + _STRIP, n)) for start in range(0, n, _STRIP)]
