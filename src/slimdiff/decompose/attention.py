"""Decompositions of attention: query-key and value-output products, all heads at one width.

Shape letters: `h` heads, `e` dense and `r` slim width of a head, `i` = h e inner channels,
`o` outputs. Moments are uncentred, E[x x^T], unless the caller centred them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.decompose.decomposition import Decomposition
from slimdiff.decompose.linalg import (
    DAMPING,
    checked_moment,
    damped,
    missing_directions_,
    refit_coupling,
    refit_curve,
    ridge_of,
    symmetric_root,
    tail_sums,
    triangular_factor,
)
from slimdiff.decompose.mixing import even_mix
from slimdiff.decompose.scaling import level_of, rescaled, scales_of

SIGMA_FLOOR = 1e-10
"""Singular values below this share of a head's largest are rounding; they get no map."""


@dataclass(frozen=True, eq=False)
class QueryKey(Decomposition):
    """Low-rank query-key products; `maps` gives "q" and "k", each (heads, e, r).

    Wq'[h] = q[h]^T Wq[h] and Wk'[h] = k[h]^T Wk[h]; biases alike.

    Attributes:
        query_hee, key_hee: (heads, e, e); the first r columns are the maps of width r.
        energy_he: (heads, e) squared singular values: what each direction of a head adds.
    """

    query_hee: Tensor
    key_hee: Tensor
    energy_he: Tensor

    def _identity(self) -> dict[str, Tensor]:
        return {"q": _eyes(self.query_hee), "k": _eyes(self.key_hee)}

    def _slim(self, width: int) -> dict[str, Tensor]:
        mix_rr = even_mix(width, self.query_hee)
        return {"q": self.query_hee[..., :width] @ mix_rr, "k": self.key_hee[..., :width] @ mix_rr}


def query_key(q_moment_hee: Tensor, k_moment_hee: Tensor) -> QueryKey:
    """Minimise E(q^T k - q'^T k')^2 over independent pairs of a query and a key, for each head.

    `errors` sums over heads, in squared logits before scaling. The SVD of Sq^1/2 Sk^1/2 =
    U diag(sigma) V^T has the singular values of the whitened Cx^1/2 Wq^T Wk Cc^1/2 (SlimDiff,
    arXiv 2509.21498, after MoDeGPT), with statistics of e by e instead of channels by channels.
    The balanced maps Tq = Sq^-1/2 U sigma^1/2 and Tk = Sk^-1/2 V sigma^1/2 are computed in the
    equal form Tq = Sk^1/2 V sigma^-1/2 and Tk = Sq^1/2 U sigma^-1/2, which inverts no moment. Then
    E|q'|^2 = E|k'|^2 = sum(sigma) <= (tr Sq tr Sk)^1/2; a factor per head gives both the ratio that
    they had, so that neither outgrows its dense range in the mean.

    All of it on channels of which the query's and the key's energy are equal: a factor that moves
    from one to the other changes no logit, and no result.

    Args:
        q_moment_hee: (heads, e, e) moment E[q q^T] of the queries, biases included.
        k_moment_hee: (heads, e, e) moment of the keys; best centred over the tokens of their own
            sample and head, since softmax ignores what a query adds to all its logits.

    Raises:
        ValueError: the moments are not (heads, e, e) both, or not finite.
    """
    shape = _head_shape(q_moment_hee, "q_moment_hee")
    q_hee = checked_moment(q_moment_hee, "q_moment_hee", shape)
    k_hee = checked_moment(k_moment_hee, "k_moment_hee", shape)
    scale_he = (scales_of(q_hee) / scales_of(k_hee)).sqrt()
    q_root_hee, q_missing = symmetric_root(rescaled(q_hee, scale_he))
    k_root_hee, k_missing = symmetric_root(rescaled(k_hee, 1 / scale_he))
    u_hee, sigma_he, vt_hee = torch.linalg.svd(q_root_hee @ k_root_hee)
    seen_he = sigma_he > SIGMA_FLOOR * sigma_he[:, :1]
    balance_h1e = torch.where(seen_he, sigma_he, 1.0).rsqrt().mul(seen_he).unsqueeze(-2)
    ratio_h11, scale_he1 = _energy_ratio(q_hee, k_hee), scale_he.unsqueeze(-1)
    return QueryKey(
        errors=tail_sums(sigma_he.square().sum(0)),
        missing=max(q_missing, k_missing),
        query_hee=k_root_hee @ vt_hee.mT * balance_h1e * ratio_h11 / scale_he1,
        key_hee=q_root_hee @ u_hee * balance_h1e / ratio_h11 * scale_he1,
        energy_he=sigma_he.square(),
    )


def _energy_ratio(q_hee: Tensor, k_hee: Tensor) -> Tensor:
    """(tr Sq / tr Sk)^1/4 of every head, (h, 1, 1); 1 where either is zero."""
    q_h, k_h = (moment.diagonal(dim1=-2, dim2=-1).sum(-1) for moment in (q_hee, k_hee))
    seen_h = (q_h > 0) & (k_h > 0)
    return torch.where(seen_h, q_h / k_h, 1.0).pow(0.25).view(-1, 1, 1)


@dataclass(frozen=True, eq=False)
class ValueOutput(Decomposition):
    """Low-rank value-output products; `maps` gives "v" (heads, e, r) and "out" (i, heads * r).

    Wv'[h] = v[h]^T Wv[h] and Wo' = Wo out; columns of `out` are ordered by head, then rank.

    Attributes:
        basis_hee: (heads, e, e) orthogonal, of channels divided by their scales; the first r
            columns span what width r keeps.
        scale_he: (heads, e) root mean square of each channel.
        moment: as it was given: (i, i), or (heads, e, e).
        joint: whether Wo is refitted over all heads at once.
        damping: the refit's ridge, as a share of each channel's energy.
    """

    basis_hee: Tensor
    scale_he: Tensor
    moment: Tensor
    joint: bool
    damping: float

    def directions(self, width: int) -> Tensor:
        """Orthonormal columns (heads, e, r), of scaled channels, about equally strong each.

        At full width they are the channels themselves.
        """
        if width == self.width:
            return _eyes(self.basis_hee)
        return self.basis_hee[..., :width] @ even_mix(width, self.basis_hee)

    def of_channels(
        self, v_her: Tensor, out_ik: Tensor, heads: Tensor | slice
    ) -> dict[str, Tensor]:
        """Maps "v" and "out" of some heads, from those of channels divided by their scales.

        The level of a head's scales keeps its slim channels in the range of the dense ones; at full
        width each channel has its own again.
        """
        scale_he, width = self.scale_he[heads], v_her.shape[-1]
        level_hr = scale_he if width == self.width else level_of(scale_he).expand(-1, width)
        v_her = v_her * (level_hr.unsqueeze(1) / scale_he.unsqueeze(2))
        return {"v": v_her, "out": self.scale_he.view(-1, 1) * out_ik / level_hr.flatten()}

    def scaled_moment(self) -> Tensor:
        """The moment of channels that are divided by their scales, float64."""
        return rescaled(self.moment, self.scale_he.view(self.moment.shape[:-1]))

    def _identity(self) -> dict[str, Tensor]:
        v_hee = _eyes(self.basis_hee)
        return {"v": v_hee, "out": torch.block_diag(*v_hee)}

    def _slim(self, width: int) -> dict[str, Tensor]:
        out_ik = self._joint_out(width) if self.joint else self._separate_out(width)
        mix_rr = even_mix(width, self.basis_hee)
        out_ik = (out_ik.unflatten(1, (len(self.basis_hee), width)) @ mix_rr).flatten(1)
        return self.of_channels(self.directions(width), out_ik, slice(None))

    def _joint_out(self, width: int) -> Tensor:
        heads, e, _ = self.basis_hee.shape
        c_ii = damped(rotated_joint(self.scaled_moment(), self.basis_hee), self.damping)
        coupling_tk = refit_coupling(c_ii, heads * width)
        eye_kk = torch.eye(heads * width, dtype=c_ii.dtype, device=c_ii.device)
        columns_ehrh = torch.cat([eye_kk, coupling_tk]).view(e, heads, width, heads)
        # Back from rank-major coordinates: rows by the basis, columns to (head, rank).
        out_hegr = torch.einsum("hej,jhrg->hegr", self.basis_hee, columns_ehrh)
        return out_hegr.reshape(heads * e, heads * width)

    def _separate_out(self, width: int) -> Tensor:
        c_hee = _blocks(self.scaled_moment(), len(self.basis_hee))
        rotated_hee = self.basis_hee.mT @ c_hee @ self.basis_hee
        coupling_htr = refit_coupling(damped(rotated_hee, self.damping), width)
        kept_her, removed_het = self.basis_hee[..., :width], self.basis_hee[..., width:]
        return torch.block_diag(*(kept_her + removed_het @ coupling_htr))


def value_output(
    w_out_oi: Tensor, moment: Tensor, heads: int, *, refit: bool, damping: float = DAMPING
) -> ValueOutput:
    """Minimise E|Wo z - Wo' z'|^2 with z' = v[h]^T z[h] in each head.

    The SVD of each head's M^1/2 Wo^T = U diag(s) V^T gives the directions M^-1/2 U, whose first
    r span the optimum of width r (SlimDiff, arXiv 2509.21498; Eckart-Young). They are Wo^T V up
    to scale, which inverts nothing; QR makes them orthonormal, so that weights never grow.
    With `refit`, Wo' is the least-squares solution over all heads at once. One order, the first
    direction of every head, then the second, ..., nests all widths, so one triangular factor
    gives the whole curve.

    All of it on channels of unit energy, M_ii = 1: a factor that moves from a channel's values to
    its column of Wo changes no output, and no result. Channels of unlike scale would be rotated
    into one another too, and rounding would take from the small ones.

    Args:
        w_out_oi: (o, i) weight of the output projection, i = heads * e.
        moment: (i, i) moment of z, the input of the output projection, or (heads, e, e) moments
            of single heads: of z, or the paper's of v, before attention averages it.
        heads: number of heads.
        refit: refit Wo jointly. Otherwise heads are separate, and `errors` adds up theirs as if
            they were uncorrelated.
        damping: ridge of the refit as a share of each channel's energy.

    Raises:
        ValueError: shapes disagree, a value is not finite, or `refit` lacks the (i, i) moment.
    """
    _check_output(w_out_oi, heads)
    o, inner = w_out_oi.shape
    e = inner // heads
    if refit and moment.ndim != 2:
        raise ValueError(f"refit needs the ({inner}, {inner}) moment, got {tuple(moment.shape)}")
    shape = (inner, inner) if moment.ndim == 2 else (heads, e, e)
    c_full = checked_moment(moment, "moment", shape)
    w_hoe, scale_he, c_full = scaled_heads(w_out_oi, c_full, heads)
    basis_hee, s_hk, missing = value_basis(w_hoe, c_full)
    if refit:
        rotated_ii = rotated_joint(c_full, basis_hee)
        errors, missing = _joint_curve(w_hoe @ basis_hee, rotated_ii, damping)
    else:
        s_he = torch.nn.functional.pad(s_hk, (0, e - s_hk.shape[-1]))
        errors = tail_sums(s_he.square().sum(0))
    return ValueOutput(errors, missing, basis_hee, scale_he, moment, joint=refit, damping=damping)


def scaled_heads(w_out_oi: Tensor, c_full: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer is on channels of unit energy: Wo (h, o, e), their scales (h, e), the moment."""
    scale_n = scales_of(_blocks(c_full, heads))
    w_hoe = w_out_oi.double().unflatten(1, (heads, -1)).transpose(0, 1)
    return w_hoe * scale_n.unsqueeze(1), scale_n, rescaled(c_full, scale_n.view(c_full.shape[:-1]))


def value_basis(w_hoe: Tensor, c_full: Tensor) -> tuple[Tensor, Tensor, int]:
    """Orthogonal directions (heads, e, e) of the values, most useful first (see `value_output`).

    Then the singular values of the heads, and the directions that the worst of them lacks.
    """
    root_hee, missing = symmetric_root(_blocks(c_full, len(w_hoe)))
    _, s_hk, vt_hko = torch.linalg.svd(root_hee @ w_hoe.mT, full_matrices=False)
    return torch.linalg.qr(w_hoe.mT @ vt_hko.mT, mode="complete").Q, s_hk, missing


def _joint_curve(w_rot_hoe: Tensor, c_ii: Tensor, damping: float) -> tuple[Tensor, int]:
    """Error (e + 1) of the joint refit in rank-major coordinates, and the missing directions."""
    l_ii = triangular_factor(damped(c_ii, damping))
    errors = refit_curve(rank_major(w_rot_hoe), l_ii)[:: len(w_rot_hoe)].contiguous()
    return errors, missing_directions_(l_ii, ridge_of(c_ii, damping))


def rank_major(w_hoe: Tensor) -> Tensor:
    """Weights (o, i) of the heads' own, columns ordered rank-major: (rank, head)."""
    return w_hoe.permute(1, 2, 0).flatten(1)


def rotated_joint(c_ii: Tensor, basis_hee: Tensor) -> Tensor:
    """Moment (i, i) in the coordinates of the bases, ordered rank-major: (rank, head)."""
    heads, e, _ = basis_hee.shape
    half_hjge = (basis_hee.mT @ c_ii.view(heads, e, heads * e)).view(heads, e, heads, e)
    return torch.einsum("hjge,gek->jhkg", half_hjge, basis_hee).reshape(c_ii.shape)


def _blocks(c_full: Tensor, heads: int) -> Tensor:
    """Diagonal blocks (heads, e, e) of an (i, i) moment; per-head moments as they are."""
    if c_full.ndim == 3:
        return c_full
    e = c_full.shape[0] // heads
    return c_full.view(heads, e, heads, e).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _eyes(like_hee: Tensor) -> Tensor:
    """Identity matrices in the shape, dtype and device of `like_hee`."""
    eye_ee = torch.eye(like_hee.shape[-1], dtype=like_hee.dtype, device=like_hee.device)
    return eye_ee.expand_as(like_hee).contiguous()


def _head_shape(moment_hee: Tensor, name: str) -> tuple[int, int, int]:
    if moment_hee.ndim != 3 or moment_hee.shape[1] != moment_hee.shape[2]:
        raise ValueError(f"{name} must be (heads, e, e), got {tuple(moment_hee.shape)}")
    return (*moment_hee.shape[:2], moment_hee.shape[1])


def _check_output(w_out_oi: Tensor, heads: int) -> None:
    if w_out_oi.ndim != 2 or heads < 1 or w_out_oi.shape[1] % heads:
        raise ValueError(
            f"w_out_oi must be (o, heads * e) with heads = {heads}, got {tuple(w_out_oi.shape)}"
        )
    if not torch.isfinite(w_out_oi).all():
        raise ValueError("w_out_oi holds infinities or NaN")
