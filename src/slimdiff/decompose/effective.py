"""Dense-size weights that behave as the slim ones.

Swapping one of them in shows what a group's maps do to the denoiser, with nothing reshaped. Each
is computed in float64 and returned in the dtype of the weight.

Shape letters: `h` heads, `e` dense and `r` slim width of a head, `i` = h e inner channels, `f`
hidden units, `o` output and `d` input channels.
"""

import torch
from torch import Tensor

Maps = dict[str, Tensor]


def effective_key(w_key: Tensor, maps: Maps) -> Tensor:
    """The key projection's weight (i, d), or bias (i,), under query-key `maps`.

    q^T k_eff = q'^T k' with Wk_eff[h] = q[h] k[h]^T Wk[h]; the query stays dense, and so does
    the softmax scale.

    Raises:
        ValueError: the weight does not have the maps' heads * e rows.
    """
    q_her, k_her = maps["q"], maps["k"]
    heads, e, _ = q_her.shape
    _check(w_key.shape[0], heads * e, "rows of the key weight")
    w_hed = w_key.double().view(heads, e, -1)
    return (q_her @ (k_her.mT @ w_hed)).reshape(w_key.shape).to(w_key.dtype)


def effective_output(w_out_oi: Tensor, maps: Maps) -> Tensor:
    """The output projection's weight (o, i) under value-output `maps`; values stay dense.

    Wo_eff = Wo out blockdiag(v)^T. The bias does not change.

    Raises:
        ValueError: the weight does not have the maps' heads * e columns.
    """
    v_her, out_ik = maps["v"], maps["out"]
    _check(w_out_oi.shape[1], out_ik.shape[0], "columns of the output weight")
    slim_ok = w_out_oi.double() @ out_ik
    return (slim_ok @ torch.block_diag(*v_her).mT).to(w_out_oi.dtype)


def effective_down(w_down_of: Tensor, maps: Maps) -> Tensor:
    """The down projection's weight (o, f) under feed-forward `maps`: zero where units went.

    Raises:
        ValueError: the weight does not have the maps' f columns.
    """
    units_r, coupling_tr = maps["units"], maps["coupling"]
    _check(w_down_of.shape[1], sum(coupling_tr.shape), "columns of the down weight")
    removed_f = torch.ones(w_down_of.shape[1], dtype=torch.bool, device=w_down_of.device)
    removed_f[units_r] = False
    w_of = w_down_of.double()
    result_of = torch.zeros_like(w_of)
    result_of[:, units_r] = w_of[:, units_r] + w_of[:, removed_f] @ coupling_tr
    return result_of.to(w_down_of.dtype)


def effective_convolution(w_conv_ocyx: Tensor, maps: Maps) -> Tensor:
    """The second convolution's kernel under ResNet `maps`: zero where channels went.

    The channels that stay are whole norm groups, so that their values do not change.
    """
    result_ocyx = torch.zeros_like(w_conv_ocyx, dtype=torch.float64)
    result_ocyx[:, maps["channels"]] = maps["weight"]
    return result_ocyx.to(w_conv_ocyx.dtype)


def effective_modulation(w_oi: Tensor, maps: Maps) -> Tensor:
    """The weight (o, i) of a modulation under its factors."""
    return (maps["weight"] @ maps["projection"]).to(w_oi.dtype)


def effective_heads(w_out_oi: Tensor, maps: Maps, heads: int) -> Tensor:
    """The output projection's weight (o, i) with zero columns at the heads that went.

    Raises:
        ValueError: the columns do not split into `heads` heads.
    """
    if heads < 1 or w_out_oi.shape[1] % heads:
        raise ValueError(f"{w_out_oi.shape[1]} columns do not split into {heads} heads")
    kept_h1 = torch.zeros(heads, 1, dtype=w_out_oi.dtype, device=w_out_oi.device)
    kept_h1[maps["heads"]] = 1
    return (w_out_oi.view(-1, heads, w_out_oi.shape[1] // heads) * kept_h1).view_as(w_out_oi)


def _check(actual: int, expected: int, what: str) -> None:
    if actual != expected:
        raise ValueError(f"{actual} {what}, but the maps are for {expected}")
