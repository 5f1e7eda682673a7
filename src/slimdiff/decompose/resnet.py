"""Decomposition of a ResNet's inner channels: which norm groups stay, and the convolution's refit.

conv1 -> (+ time) -> norm2 -> SiLU -> conv2: GroupNorm ties the channels of a norm group together,
so whole norm groups go, and the statistics of those that stay do not change.

Shape letters: `c` inner channels, `g` norm groups, `s` kept channels, `o` output channels of the
second convolution, `w` frequencies of its taps.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimdiff.decompose.autocovariance import (
    LAGS,
    MULTIPLICITY,
    spectral_moment,
    spectral_weight,
    unfolded_moment,
    unfolded_product,
)
from slimdiff.decompose.block_elimination import block_elimination
from slimdiff.decompose.decomposition import Decomposition
from slimdiff.decompose.linalg import (
    checked_moment,
    damped,
    raised_factor,
    refit_curve,
    truncation_curve,
)

LAG_DAMPING = 1e-2
"""Ridge of the refit. Nine taps of a smooth map say much the same, so that a small ridge answers
with large kernels of both signs, which amplify what other slim layers change. From 1e-5 to 1e-2
the error on held-out prompts is the same or falls, and the largest weights halve."""

UNSEEN = 1e-7
"""Share of the largest eigenvalue below which a direction of the channels counts as never excited;
the rounding of float32 products is not far below."""

GroupOrder = Literal["elimination", "leverage", "magnitude"]


@dataclass(frozen=True, eq=False)
class ResNetChannels(Decomposition):
    """Selected norm groups; `maps` gives "channels" (s,) ascending and "weight" (o, s, 3, 3).

    `errors` at a width between two multiples of the norm group's size is that of the lower one.

    Attributes:
        order_c: (c,) int64, channels by falling importance, a norm group's side by side.
        lags_lcc: (13, c, c), as they were given.
        weight_ocyx: (o, c, 3, 3), the dense kernel.
        refit: whether the kept kernel is the least-squares one.
        damping: the refit's ridge, as a share of the mean diagonal.
    """

    order_c: Tensor
    lags_lcc: Tensor
    weight_ocyx: Tensor
    refit: bool
    damping: float

    def _identity(self) -> dict[str, Tensor]:
        return {"channels": self.order_c.sort().values, "weight": self.weight_ocyx.double()}

    def _slim(self, width: int) -> dict[str, Tensor]:
        kept_s = self.order_c[:width].sort().values
        weight_osyx = self.weight_ocyx[:, kept_s].double()
        if self.refit and width:
            weight_osyx = self._refitted(kept_s)
        return {"channels": kept_s, "weight": weight_osyx}

    def _refitted(self, kept_s: Tensor) -> Tensor:
        """W' = (W C)_S C_SS^-1 with C the damped moment of the unfolded input."""
        lags_lcc = self.lags_lcc.double()
        scale = float(lags_lcc[0].diagonal().mean())
        w_ocyx = self.weight_ocyx.double()
        target_ok = unfolded_product(w_ocyx, lags_lcc, kept_s)
        target_ok += self.damping * scale * w_ocyx[:, kept_s].flatten(1)
        l_kk, _ = raised_factor(
            lambda: unfolded_moment(lags_lcc, kept_s, kept_s), scale, self.damping
        )
        w_ok = torch.cholesky_solve(target_ok.mT, l_kk).mT
        return w_ok.reshape(len(w_ocyx), len(kept_s), 3, 3).contiguous()


def resnet_channels(
    weight_ocyx: Tensor,
    lags_lcc: Tensor,
    groups: int,
    *,
    order: GroupOrder | Tensor = "elimination",
    refit: bool = True,
    damping: float = LAG_DAMPING,
) -> ResNetChannels:
    """Minimise E|conv2(a) - conv2'(a[channels])|^2 over nested sets of norm groups.

    One triangular factor of the unfolded moment in the order of importance gives the error of
    every width, refit included.

    Args:
        weight_ocyx: (o, c, 3, 3) kernel of the second convolution.
        lags_lcc: (13, c, c) autocovariances of its input (see `autocovariance`).
        groups: norm groups of its input, c / groups neighbouring channels each.
        order: how to choose norm groups: "elimination" by the error that each causes after the
            refit, "leverage" by ridge leverage, "magnitude" by mean square; or the channels
            themselves, (c,) int64, most useful first.
        refit: fold what goes into what stays, by least squares.
        damping: least ridge of the refit, as a share of the moment's mean diagonal; raised where
            the moment is not positive definite.

    Raises:
        ValueError: shapes disagree, a value is not finite, or the order is unknown.
    """
    channels = weight_ocyx.shape[1]
    lags_lcc = checked_moment(lags_lcc, "lags_lcc", (len(LAGS), channels, channels))
    if weight_ocyx.shape[2:] != (3, 3) or channels % groups:
        raise ValueError(f"kernel {tuple(weight_ocyx.shape)} is not 3 by 3 in {groups} groups")
    if isinstance(order, Tensor):
        order_c = order
    else:
        order_g = group_order(weight_ocyx.double(), lags_lcc, groups, order, damping)
        order_c = _channels_of(order_g, channels // groups)
    errors, missing, damping = _curve(weight_ocyx, lags_lcc, order_c, refit, damping)
    stairs = errors[:: channels // groups].repeat_interleave(channels // groups)[: channels + 1]
    return ResNetChannels(stairs, missing, order_c, lags_lcc, weight_ocyx, refit, damping)


def _curve(
    weight_ocyx: Tensor, lags_lcc: Tensor, order_c: Tensor, refit: bool, damping: float
) -> tuple[Tensor, int, float]:
    """Errors (c + 1), channels that calibration did not excite, and the damping that was needed."""
    w_of = weight_ocyx[:, order_c].flatten(1).double()

    def moment_ff() -> Tensor:
        return unfolded_moment(lags_lcc, order_c, order_c)

    if not refit:
        return truncation_curve(w_of, moment_ff())[::9].contiguous(), 0, damping
    scale = float(lags_lcc[0].diagonal().mean())
    l_ff, raised = raised_factor(moment_ff, scale, damping)
    errors = refit_curve(w_of, l_ff)[::9].contiguous()
    values_c = torch.linalg.eigvalsh(lags_lcc[0])
    missing = int((values_c <= UNSEEN * values_c[-1].clamp_min(0)).sum())
    return errors, missing if raised == damping else len(order_c), raised


def group_order(
    w_ocyx: Tensor, lags_lcc: Tensor, groups: int, order: GroupOrder, damping: float
) -> Tensor:
    """Norm groups (g,) int64 by falling importance.

    Raises:
        ValueError: unknown `order`.
    """
    if order == "elimination":
        share_w = torch.tensor(MULTIPLICITY, dtype=torch.float64, device=w_ocyx.device)
        spectral = spectral_weight(w_ocyx), spectral_moment(lags_lcc)
        return block_elimination(*spectral, share_w, groups, damping).order_b
    moment_cc = lags_lcc[0]
    if order == "magnitude":
        score_c = moment_cc.diagonal()
    elif order == "leverage":
        score_c = torch.linalg.solve(damped(moment_cc, 1.0), moment_cc).diagonal()
    else:
        raise ValueError(f"order must be elimination, leverage or magnitude, got {order!r}")
    return score_c.view(groups, -1).sum(1).argsort(descending=True, stable=True)


def _channels_of(order_g: Tensor, size: int) -> Tensor:
    return (order_g.unsqueeze(1) * size + torch.arange(size, device=order_g.device)).flatten()
