"""The order in which blocks of channels can go: backward elimination with refit.

As for hidden units (see `elimination`), with G the inverse moment and H = W^H W under the present
refit: removing block b costs tr(H_bb G_bb^-1); then G loses G_:b G_bb^-1 G_b:, and W loses
W_b G_bb^-1 G_b:. Rows and columns of b are zero from then on.

Shape letters: `w` terms of the error, such as frequencies, each with a weight and a moment of its
own; `c` channels, `b` blocks, `e` channels of a block, `o` output channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_TINY = 1e-100


class Eliminated(NamedTuple):
    """Blocks (b,) int64, most useful first, and the error with the last n of them gone.

    `lost` begins with 0 for n = 0, and ends where the search did: blocks that were never removed
    stand first, in their old order.
    """

    order_b: Tensor
    lost: tuple[float, ...]


def block_elimination(
    w_woc: Tensor,
    moment_wcc: Tensor,
    share_w: Tensor,
    blocks: int,
    damping: float,
    *,
    largest: float = torch.inf,
) -> Eliminated:
    """Greedily remove the block whose removal costs least after the refit, until one is left.

    Args:
        w_woc: weights, real or complex.
        moment_wcc: Hermitian moments of the channels.
        share_w: how much each term counts in the error.
        blocks: of c / blocks neighbouring channels each.
        damping: ridge as a share of each moment's mean diagonal; raised where a moment is not
            positive definite.
        largest: stop before the error exceeds this.
    """
    inverse_wcc = _inverse(moment_wcc, damping)
    gram_wcc = w_woc.mH @ w_woc
    size = w_woc.shape[-1] // blocks
    left, gone, lost = list(range(blocks)), [], [0.0]
    while len(left) > 1:
        g_wbee, h_wbee = (_diagonal_blocks(x, size)[:, left] for x in (inverse_wcc, gram_wcc))
        cost_wb = torch.linalg.solve(g_wbee, h_wbee).diagonal(dim1=-2, dim2=-1).sum(-1).real
        cost_b = share_w @ cost_wb
        cheapest = int(cost_b.argmin())
        error = lost[-1] + max(0.0, float(cost_b[cheapest]))
        if error > largest:
            break
        lost.append(error)
        gone.append(left.pop(cheapest))
        _remove_(inverse_wcc, gram_wcc, gone[-1] * size, (gone[-1] + 1) * size)
    return Eliminated(torch.tensor(left + gone[::-1], device=w_woc.device), tuple(lost))


def _remove_(inverse_wcc: Tensor, gram_wcc: Tensor, start: int, stop: int) -> None:
    """Update G and H, in place, when the channels from `start` to `stop` go.

    With K = G_bb^-1 G_b: and A = H_:b - K^H H_bb / 2, H loses A K + K^H A^H.
    """
    own = slice(start, stop)
    rows_wec = inverse_wcc[:, own].clone()
    k_wec = torch.linalg.solve(inverse_wcc[:, own, own], rows_wec)
    a_wce = gram_wcc[:, :, own] - k_wec.mH @ gram_wcc[:, own, own] / 2
    inverse_wcc.baddbmm_(rows_wec.mH, k_wec, alpha=-1)
    gram_wcc.baddbmm_(torch.cat([a_wce, k_wec.mH], -1), torch.cat([k_wec, a_wce.mH], -2), alpha=-1)
    for matrix_wcc in (inverse_wcc, gram_wcc):  # rounding alone
        matrix_wcc[:, own] = 0
        matrix_wcc[:, :, own] = 0


def _inverse(moment_wcc: Tensor, damping: float) -> Tensor:
    """Inverses of damped Hermitian moments; the ridge rises until all are positive definite."""
    ridge_w = damping * moment_wcc.diagonal(dim1=-2, dim2=-1).real.mean().clamp_min(_TINY)
    eye_cc = torch.eye(moment_wcc.shape[-1], dtype=moment_wcc.dtype, device=moment_wcc.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(moment_wcc + ridge_w * eye_cc)
        if not bool(failed.any()):
            return torch.cholesky_inverse(factor)
        ridge_w = ridge_w * 10


def _diagonal_blocks(x_wmm: Tensor, size: int) -> Tensor:
    blocks = x_wmm.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
