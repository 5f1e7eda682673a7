"""Whole heads that go: which of them, what is lost without them, and the maps of those that stay.

Shape letters as in `attention`; `k` heads that stay, ascending in maps.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.decompose.attention import QueryKey, ValueOutput, rank_major, rotated_joint
from slimdiff.decompose.block_elimination import Eliminated, block_elimination
from slimdiff.decompose.decomposition import Decomposition
from slimdiff.decompose.linalg import (
    DAMPING,
    checked_moment,
    damped,
    refit_curve,
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
        damping: ridge as a share of the moment's mean diagonal.
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
    share_w = c_ii.new_ones(1)
    terms = w_out_oi.double().unsqueeze(0), c_ii.unsqueeze(0)
    return block_elimination(*terms, share_w, heads, damping, largest=largest)


def errors_by_heads(
    query_key: QueryKey,
    value_output: ValueOutput,
    w_out_oi: Tensor,
    order_h: Tensor,
    counts: Iterable[int],
) -> dict[int, tuple[Tensor, Tensor]]:
    """Errors (e + 1,) of both halves by width, when the first n heads of an order alone stay.

    Logits of a head that went do not matter. Values are predicted, all of Wo z, from the kept
    directions of the heads that stay: in the order first direction of every such head, second, ...,
    and then the heads that went, one triangular factor gives all widths.

    Args:
        query_key, value_output: of all heads; the latter with a joint refit.
        w_out_oi: (o, i) weight of the output projection.
        order_h: (h,) int64, most useful first.
        counts: the n to tell errors for.
    """
    heads, e, _ = value_output.basis_hee.shape
    w_hoe = w_out_oi.double().unflatten(1, (heads, e)).transpose(0, 1)
    w_oi = rank_major(w_hoe @ value_output.basis_hee)
    moment_ii = rotated_joint(value_output.moment.double(), value_output.basis_hee)
    c_ii = damped(moment_ii, value_output.damping)
    place_eh = torch.arange(e * heads, device=order_h.device).view(e, heads)
    found = {}
    for count in counts:
        kept_k, gone_t = order_h[:count], order_h[count:]
        place_i = torch.cat([place_eh[:, kept_k].flatten(), place_eh[:, gone_t].flatten()])
        errors_i = refit_curve(w_oi[:, place_i], triangular_factor(c_ii[place_i][:, place_i]))
        logits = tail_sums(query_key.energy_he[kept_k].sum(0))
        found[count] = logits, errors_i[: e * count + 1 : count].contiguous()
    return found


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
        v_ker = found.maps(width)["v"][heads_k]
        return {"heads": heads_k, "v": v_ker, "out": _refit(found, heads_k, v_ker)}
    raise ValueError(f"{type(found).__name__}: heads only go where the output is refit jointly")


def _refit(found: ValueOutput, heads_k: Tensor, v_ker: Tensor) -> Tensor:
    """Least-squares weights (i, k * r) that predict z from what the heads that stay keep of it.

    With P (i, k * r) the kept directions, z is predicted by C P (P^T C P)^-1; what it says about
    the directions themselves, the identity but for rounding, is made the identity.
    """
    heads, e, _ = found.basis_hee.shape
    p_ik = spread_heads(torch.block_diag(*v_ker), heads_k, heads)
    c_ii = damped(found.moment.double(), found.damping)
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
