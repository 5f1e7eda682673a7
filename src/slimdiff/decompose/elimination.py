"""The order in which hidden units can go: backward elimination with refit.

Optimal brain surgeon (Hassibi and Stork, 1993): with C = E[h h^T], removing unit j and refitting
the others costs |w_j|^2 / [C^-1]_jj. It changes W to W - w_j g_j^T / G_jj and G = C^-1 to
G - g_j g_j^T / G_jj, which is the inverse of C without j.

Shape letters: `f` hidden units, `m` those that remain, `c` candidates, `b` the units of one
round, `o` output channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.decompose.linalg import damped, inverse_of_factored_, triangular_factor

ROUND = 128
CANDIDATES = 2 * ROUND


def elimination_order(
    w_down_of: Tensor,
    c_ff: Tensor,
    damping: float = 0.0,
    *,
    round_size: int = ROUND,
    candidates: int = CANDIDATES,
) -> Tensor:
    """Units (f,) int64, the last to go first, so that every prefix is what remains at its width.

    Greedy in rounds: the `candidates` cheapest units by the scores of the moment compete until
    `round_size` of them are gone, scores among them being updated after each removal; then all
    others are updated with one product. It is exactly greedy while no more than `candidates`
    units remain.

    Args:
        w_down_of: (o, f) weight of the down projection, float64.
        c_ff: (f, f) moment of its input, float64.
        damping: ridge as a share of the moment's mean diagonal.
        round_size: units removed between two updates of everything.
        candidates: units that compete in a round, at least `round_size`.

    Raises:
        ValueError: `round_size` is not within 1 .. `candidates`.
    """
    if not 1 <= round_size <= candidates:
        raise ValueError(f"round_size must be within 1 .. {candidates}, got {round_size}")
    state = _Remaining(
        units_m=torch.arange(len(c_ff), device=c_ff.device),
        inverse_mm=inverse_of_factored_(triangular_factor(damped(c_ff, damping))),
        weight_mo=w_down_of.mT.clone(),
    )
    removed: list[Tensor] = []
    while len(state.units_m) > 0:
        compete = _cheapest(state, candidates)
        gone = compete[_remove_greedily(state, compete, round_size)]
        removed.append(state.units_m[gone])
        state = _without(state, gone)
    return torch.cat(removed).flip(0)


@dataclass(frozen=True)
class _Remaining:
    """Units still there, C^-1 among them and their refitted weights; the tensors are updated."""

    units_m: Tensor
    inverse_mm: Tensor
    weight_mo: Tensor


def _cheapest(state: _Remaining, count: int) -> Tensor:
    """Positions (c,) of the `count` lowest scores, ascending."""
    score_m = state.weight_mo.square().sum(-1) / state.inverse_mm.diagonal()
    return score_m.argsort(stable=True)[:count].sort().values


def _remove_greedily(state: _Remaining, compete_c: Tensor, count: int) -> Tensor:
    """Positions (b,) within `compete_c` of the units that go, in the order in which they go.

    Only the rows that are needed are ever brought up to date: with p = g_j / G_jj^1/2 the inverse
    becomes G - p p^T, and the Gram matrix H = W^T W becomes H - p q^T - q p^T, where
    q = h_j / G_jj^1/2 - (H_jj / 2 G_jj) p.
    """
    inverse_cc = state.inverse_mm[compete_c][:, compete_c]
    gram_cc = state.weight_mo[compete_c] @ state.weight_mo[compete_c].mT
    inverse_c, gram_c = inverse_cc.diagonal().clone(), gram_cc.diagonal().clone()
    gone_c = torch.zeros_like(compete_c, dtype=torch.bool)
    count = min(count, len(compete_c))
    pq_2bc = inverse_cc.new_empty(2, count, len(compete_c))
    order = []
    for step in range(count):
        j = int((gram_c / inverse_c).masked_fill_(gone_c, torch.inf).argmin())
        # A product of two rows rather than matrix times vector, which BLAS would split among
        # threads at this size, at the price of waiting for the slowest.
        (pp_c, qp_c), (pq_c, _) = pq_2bc[:, :step, j] @ pq_2bc[:, :step]
        g_c = inverse_cc[j] - pp_c
        h_c = gram_cc[j] - qp_c - pq_c
        scale = g_c[j].rsqrt()
        p_c = torch.mul(g_c, scale, out=pq_2bc[0, step])
        half = float(h_c[j] * scale.square() / 2)
        q_c = torch.sub(h_c * scale, p_c, alpha=half, out=pq_2bc[1, step])
        inverse_c -= p_c.square()
        gram_c -= 2 * p_c * q_c
        gone_c[j] = True
        order.append(j)
    return torch.tensor(order, device=compete_c.device)


def _without(state: _Remaining, gone_b: Tensor) -> _Remaining:
    """Remove the units at the positions `gone_b`: one Schur complement for all of them."""
    l_bb = triangular_factor(state.inverse_mm[gone_b][:, gone_b])
    p_bm = torch.linalg.solve_triangular(l_bb, state.inverse_mm[gone_b], upper=False)
    u_bo = torch.linalg.solve_triangular(l_bb, state.weight_mo[gone_b], upper=False)
    left = len(state.units_m) - len(gone_b)
    _fill_gaps(state, p_bm, gone_b, left)
    p_bm = p_bm[:, :left]
    return _Remaining(
        units_m=state.units_m[:left],
        inverse_mm=state.inverse_mm[:left, :left].addmm_(p_bm.mT, p_bm, alpha=-1),
        weight_mo=state.weight_mo[:left].addmm_(p_bm.mT, u_bo, alpha=-1),
    )


def _fill_gaps(state: _Remaining, p_bm: Tensor, gone_b: Tensor, left: int) -> None:
    """Move units from the end into the gaps, so that the first `left` positions are the rest."""
    stays_m = torch.ones_like(state.units_m, dtype=torch.bool)
    stays_m[gone_b] = False
    gaps = (~stays_m[:left]).nonzero().squeeze(-1)
    movers = left + stays_m[left:].nonzero().squeeze(-1)
    state.units_m[gaps] = state.units_m[movers]
    state.weight_mo[gaps] = state.weight_mo[movers]
    state.inverse_mm[gaps] = state.inverse_mm[movers]
    state.inverse_mm[:, gaps] = state.inverse_mm[:, movers]
    p_bm[:, gaps] = p_bm[:, movers]
