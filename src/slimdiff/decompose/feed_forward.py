"""Decomposition of a feed-forward: which hidden units stay, and what the others leave to them.

Shape letters: `f` hidden units (the input of the down projection; half the rows of a gated up
projection), `r` kept and `t` removed units, `o` output channels.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from slimdiff.decompose.decomposition import Decomposition
from slimdiff.decompose.elimination import elimination_order
from slimdiff.decompose.linalg import (
    DAMPING,
    checked_moment,
    damped,
    inverse_of_factored_,
    missing_directions_,
    refit_coupling,
    refit_curve,
    ridge_of,
    triangular_factor,
    truncation_curve,
)
from slimdiff.decompose.scaling import rescaled, scales_of

Order = Literal["elimination", "leverage", "magnitude"]


@dataclass(frozen=True, eq=False)
class FeedForward(Decomposition):
    """Selected units; `maps` gives "units" (r,) int64 ascending and "coupling" (f - r, r).

    up' = up[units] and Wd' = Wd[:, units] + Wd[:, removed] coupling, `removed` ascending.

    Attributes:
        order_f: (f,) int64, the units by falling importance: width r keeps the first r.
        moment_ff: as it was given.
        refit: whether the coupling is the least-squares one; zeros otherwise.
        damping: the refit's ridge, as a share of the mean diagonal.
        homogeneous: whether that is the diagonal of units of equal energy (see `feed_forward`).
    """

    order_f: Tensor
    moment_ff: Tensor
    refit: bool
    damping: float
    homogeneous: bool = False

    def _identity(self) -> dict[str, Tensor]:
        return {
            "units": self.order_f.sort().values,
            "coupling": self.errors.new_zeros(0, self.width),
        }

    def _slim(self, width: int) -> dict[str, Tensor]:
        units_r = self.order_f[:width].sort().values
        removed_t = self.order_f[width:].sort().values
        if not self.refit:
            return {"units": units_r, "coupling": self.errors.new_zeros(len(removed_t), width)}
        order_f = torch.cat([units_r, removed_t])
        c_ff = _permuted(self.moment_ff, order_f)
        if not self.homogeneous:
            c_ff = damped(c_ff.double(), self.damping)
            return {"units": units_r, "coupling": refit_coupling(c_ff, width)}
        scale_f = scales_of(c_ff)
        coupling_tr = refit_coupling(damped(rescaled(c_ff, scale_f), self.damping), width)
        kept_r, gone_t = scale_f[:width], scale_f[width:]
        return {"units": units_r, "coupling": gone_t[:, None] * coupling_tr / kept_r}


def feed_forward(
    w_down_of: Tensor,
    h_moment_ff: Tensor,
    *,
    order: Order | Tensor,
    refit: bool = True,
    magnitude_f: Tensor | None = None,
    leverage_ridge: float = 1.0,
    damping: float = DAMPING,
    homogeneous: bool = False,
) -> FeedForward:
    """Minimise E|Wd h - Wd' h[units]|^2 over nested sets of units.

    With `refit`, Wd' = Wd C[:, S] C[S, S]^-1, and one triangular factor of the permuted moment
    gives the error of every width. Without it `errors` is exact too, but may rise with the width
    where removed units cancel each other.

    Args:
        w_down_of: (o, f) weight of the down projection.
        h_moment_ff: (f, f) moment E[h h^T] of its input.
        order: how to choose units (see `unit_order`), or the order itself, (f,) int64.
        refit: fold the removed units into those that stay, by least squares.
        magnitude_f: (f,) mean |h|, for order "magnitude".
        leverage_ridge: ridge of the leverage scores, in mean eigenvalues.
        damping: ridge of the refit as a share of the moment's mean diagonal.
        homogeneous: a factor on a unit can be moved into the columns of `w_down_of`, as where a
            linear part is multiplied by gates: units are brought to equal energy first, so that
            nothing depends on such factors.

    Raises:
        ValueError: shapes disagree, a value is not finite, the order is unknown or not a
            permutation, or "magnitude" lacks `magnitude_f`.
    """
    c_ff, w_down_of = _checked(w_down_of, h_moment_ff), w_down_of.double()
    if homogeneous:
        scale_f = scales_of(c_ff)
        c_ff, w_down_of = rescaled(c_ff, scale_f), w_down_of * scale_f
    if isinstance(order, Tensor):
        order_f = _checked_order(order, len(c_ff))
    else:
        order_f = unit_order(
            w_down_of,
            c_ff,
            order,
            magnitude_f=magnitude_f,
            leverage_ridge=leverage_ridge,
            damping=damping,
        )
    w_of = w_down_of[:, order_f]
    l_ff = triangular_factor(damped(_permuted(c_ff, order_f), damping))
    errors = refit_curve(w_of, l_ff) if refit else truncation_curve(w_of, _permuted(c_ff, order_f))
    return FeedForward(
        errors=errors,
        missing=missing_directions_(l_ff, ridge_of(c_ff, damping)),
        order_f=order_f,
        moment_ff=h_moment_ff,
        refit=refit,
        damping=damping,
        homogeneous=homogeneous,
    )


def unit_order(
    w_down_of: Tensor,
    h_moment_ff: Tensor,
    order: Order,
    *,
    magnitude_f: Tensor | None = None,
    leverage_ridge: float = 1.0,
    damping: float = DAMPING,
) -> Tensor:
    """Hidden units (f,) int64 by falling importance; arguments as for `feed_forward`.

    - "elimination": the reverse of the order in which optimal brain surgeon removes them.
    - "leverage": by ridge leverage diag(C (C + l I)^-1), l = `leverage_ridge` mean eigenvalues
      (SlimDiff, arXiv 2509.21498, after MoDeGPT).
    - "magnitude": by mean absolute activation.

    Raises:
        ValueError: as `feed_forward` does.
    """
    c_ff = _checked(w_down_of, h_moment_ff)
    if order == "elimination":
        return elimination_order(w_down_of.double(), c_ff, damping)
    if order == "leverage":
        return _leverage(c_ff, leverage_ridge).argsort(descending=True, stable=True)
    if order == "magnitude":
        return _checked_magnitude(magnitude_f, len(c_ff)).argsort(descending=True, stable=True)
    raise ValueError(f"order must be one of {get_args(Order)}, got {order!r}")


def _leverage(c_ff: Tensor, ridge_share: float) -> Tensor:
    """Ridge leverage (f,), as 1 - l diag((C + l I)^-1)."""
    if ridge_share <= 0:
        raise ValueError(f"leverage_ridge must be positive, got {ridge_share}")
    inverse_ff = inverse_of_factored_(triangular_factor(damped(c_ff, ridge_share)))
    return 1 - ridge_of(c_ff, ridge_share) * inverse_ff.diagonal()


def _permuted(c_ff: Tensor, order_f: Tensor) -> Tensor:
    return c_ff[order_f][:, order_f]


def _checked(w_down_of: Tensor, h_moment_ff: Tensor) -> Tensor:
    if w_down_of.ndim != 2 or not torch.isfinite(w_down_of).all():
        raise ValueError(f"w_down_of must be finite and (o, f), got {tuple(w_down_of.shape)}")
    hidden = w_down_of.shape[1]
    return checked_moment(h_moment_ff, "h_moment_ff", (hidden, hidden))


def _checked_order(order_f: Tensor, hidden: int) -> Tensor:
    every_f = torch.arange(hidden, device=order_f.device)
    if order_f.shape != (hidden,) or not torch.equal(order_f.sort().values, every_f):
        raise ValueError(f"order must be a permutation of {hidden} units, int64; got {order_f}")
    return order_f


def _checked_magnitude(magnitude_f: Tensor | None, hidden: int) -> Tensor:
    if magnitude_f is None:
        raise ValueError('order "magnitude" needs magnitude_f, the mean absolute activations')
    if magnitude_f.shape != (hidden,):
        raise ValueError(f"magnitude_f is {tuple(magnitude_f.shape)}, expected ({hidden},)")
    return magnitude_f
