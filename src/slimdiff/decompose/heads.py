"""Whole heads that go: which of them, what is lost without them, and the maps of those that stay.

Shape letters as in `attention`; `k` heads that stay, ascending in maps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.decompose.attention import (
    QueryKey,
    ValueOutput,
    rank_major,
    rotated_joint,
    scaled_heads,
    value_basis,
)
from slimdiff.decompose.block_elimination import Eliminated, block_elimination
from slimdiff.decompose.decomposition import Decomposition
from slimdiff.decompose.linalg import (
    DAMPING,
    checked_moment,
    damped,
    tail_sums,
    triangular_factor,
)


def head_order(
    w_out_oi: Tensor,
    moment_ii: Tensor,
    heads: int,
    *,
    damping: float = DAMPING,
    largest: float = torch.inf,
) -> Eliminated:
    """Heads by what Wo z loses without them, Wo being refitted jointly to those that stay.

    Backward elimination with whole heads for units (optimal brain surgeon, Hassibi and Stork,
    1993): the error with the last n heads of the order gone is `lost[n]`.

    Args:
        w_out_oi: (o, i) weight of the output projection, i = heads * e.
        moment_ii: (i, i) moment E[z z^T] of its input.
        heads: number of heads.
        damping: ridge as a share of each channel's energy.
        largest: heads stop going before the error exceeds this.

    Raises:
        ValueError: shapes disagree, or a value is not finite.
    """
    inner = w_out_oi.shape[1]
    if heads < 1 or inner % heads or not torch.isfinite(w_out_oi).all():
        raise ValueError(
            f"w_out_oi must be finite and (o, heads * e) with heads = {heads}, "
            f"got {tuple(w_out_oi.shape)}"
        )
    c_ii = checked_moment(moment_ii, "moment_ii", (inner, inner))
    w_hoe, _, c_ii = scaled_heads(w_out_oi, c_ii, heads)
    share_w = c_ii.new_ones(1)
    terms = w_hoe.transpose(0, 1).flatten(1).unsqueeze(0), c_ii.unsqueeze(0)
    return block_elimination(*terms, share_w, heads, damping, largest=largest)


@dataclass(frozen=True, eq=False)
class HeadErrors:
    """What both halves of an attention layer lose by width, where some heads alone stay.

    Values are rotated to the directions that narrow heads keep, and ordered rank-major: the first
    of every head, then the second, ...

    Attributes:
        energy_he: of the logits' directions (see `QueryKey`).
        moment_ii: of the rotated values, damped.
        cross_oi: moment of the output, columns, with the rotated values.
        energy: E|Wo z|^2 under the damped moment.
    """

    energy_he: Tensor
    moment_ii: Tensor
    cross_oi: Tensor
    energy: Tensor

    def of(self, heads_k: Tensor) -> tuple[Tensor, Tensor]:
        """Errors (e + 1,) of queries and keys, and of values and output, with heads (k,) alone.

        Logits of a head that went do not matter. All of Wo z is predicted from the values that
        stay; one triangular factor L of their moment gives every width, because the columns of
        E[Wo z x^T] L^-T have the energies that each of them explains beyond those before it.
        """
        heads, e = self.energy_he.shape
        place_eh = torch.arange(e * heads, device=self.moment_ii.device).view(e, heads)
        place_k = place_eh[:, heads_k].flatten()
        l_kk = triangular_factor(self.moment_ii[place_k][:, place_k])
        columns_ko = torch.linalg.solve_triangular(l_kk, self.cross_oi[:, place_k].mT, upper=False)
        explained_e = columns_ko.square().sum(1).view(e, -1).sum(1).cumsum(0)
        left = self.energy - torch.cat([explained_e.new_zeros(1), explained_e])
        return tail_sums(self.energy_he[heads_k].sum(0)), left.clamp_min(0.0)


def head_errors(
    query_key: QueryKey, w_out_oi: Tensor, moment_ii: Tensor, damping: float = DAMPING
) -> HeadErrors:
    """What a layer loses where some heads alone stay, at every width.

    Args:
        query_key: of all heads.
        w_out_oi: (o, i) weight of the output projection, i = heads * e.
        moment_ii: (i, i) moment E[z z^T] of its input.
        damping: ridge as a share of each channel's energy.
    """
    w_hoe, _, c_ii = scaled_heads(w_out_oi, moment_ii.double(), len(query_key.energy_he))
    basis_hee = value_basis(w_hoe, c_ii)[0]
    c_ii = damped(rotated_joint(c_ii, basis_hee), damping)
    w_oi = rank_major(w_hoe @ basis_hee)
    cross_oi = w_oi @ c_ii
    return HeadErrors(query_key.energy_he, c_ii, cross_oi, (cross_oi * w_oi).sum())


def maps_of_heads(found: Decomposition, heads_k: Tensor, width: int) -> dict[str, Tensor]:
    """Maps of the heads `heads_k` (k,) alone, ascending int64, at `width` each.

    "heads" (k,), and "q" and "k" (k, e, r), or "v" (k, e, r) and "out" (i, k * r): Wo' = Wo out.
    At full width q, k and v are identities.

    Raises:
        ValueError: `width` is not within 1 .. the dense width; or the decomposition is not one of
            queries and keys, or of values with a joint refit.
    """
    if not 1 <= width <= found.width:
        raise ValueError(f"width must be within 1 .. {found.width}, got {width}")
    if isinstance(found, QueryKey):
        maps = found.maps(width)
        return {"heads": heads_k, "q": maps["q"][heads_k], "k": maps["k"][heads_k]}
    if isinstance(found, ValueOutput) and found.joint:
        v_ker = found.directions(width)[heads_k]
        out_ik = _refit(found, heads_k, v_ker)
        return {"heads": heads_k} | found.of_channels(v_ker, out_ik, heads_k)
    raise ValueError(f"{type(found).__name__}: heads only go where the output is refit jointly")


def _refit(found: ValueOutput, heads_k: Tensor, v_ker: Tensor) -> Tensor:
    """Least-squares weights (i, k * r) that predict z from what the heads that stay keep of it.

    Of channels that are divided by their scales.

    With P (i, k * r) the kept directions, z is predicted by C P (P^T C P)^-1; what it says about
    the directions themselves, the identity but for rounding, is made the identity.
    """
    heads, e, _ = found.basis_hee.shape
    p_ik = spread_heads(torch.block_diag(*v_ker), heads_k, heads)
    c_ii = damped(found.scaled_moment(), found.damping)
    cp_ik = c_ii @ p_ik
    guess_ik = torch.cholesky_solve(cp_ik.mT, triangular_factor(p_ik.mT @ cp_ik)).mT
    return p_ik + guess_ik - p_ik @ (p_ik.mT @ guess_ik)


def spread_heads(x_kn: Tensor, heads_k: Tensor, heads: int) -> Tensor:
    """Rows (heads * e, n) with those of `x_kn` (k * e, n) at the heads `heads_k`, else zero."""
    rows_ken = x_kn.unflatten(0, (len(heads_k), -1))
    result_hen = x_kn.new_zeros(heads, *rows_ken.shape[1:])
    result_hen[heads_k] = rows_ken
    return result_hen.flatten(0, 1)


@dataclass(frozen=True)
class HeadSelection:
    """Heads in falling order of importance; `maps(n)` gives "heads" (n,), ascending int64."""

    order_h: Tensor

    def maps(self, heads: int) -> dict[str, Tensor]:
        """The `heads` most important heads.

        Raises:
            ValueError: `heads` is not within 0 .. the number of heads.
        """
        if not 0 <= heads <= len(self.order_h):
            raise ValueError(f"heads must be within 0 .. {len(self.order_h)}, got {heads}")
        return {"heads": self.order_h[:heads].sort().values}


def whole_heads(importance_h: Tensor) -> HeadSelection:
    """Keep whole heads by `importance_h` (heads,), largest first; of equals, the earlier.

    Raises:
        ValueError: `importance_h` is not one-dimensional, or not finite.
    """
    if importance_h.ndim != 1 or not torch.isfinite(importance_h).all():
        raise ValueError(f"importance_h must be finite and (heads,), got {importance_h}")
    return HeadSelection(importance_h.argsort(descending=True, stable=True))
