"""Dense-size weights that behave as the slim ones.

Swapping one of them in shows what a group's maps do to the denoiser, with nothing reshaped. Each
is computed in float64 and returned in the dtype of the weight.

Shape letters: `h` heads, `e` dense and `r` slim width of a head, `i` = h e inner channels, `k`
heads that stay, `f` hidden units, `o` output and `d` input channels.
"""

import torch
from torch import Tensor

Maps = dict[str, Tensor]


def effective_key(w_key: Tensor, maps: Maps) -> Tensor:
    """The key projection's weight (i, d), or bias (i,), under query-key `maps`.

    q^T k_eff = q'^T k' with Wk_eff[h] = q[h] k[h]^T Wk[h]; the query stays dense, and so does
    the softmax scale. Where `maps` name the "heads" that stay, keys of the others do not matter
    (see `effective_output`) and stay as they are.

    Raises:
        ValueError: the weight does not have the maps' heads * e rows.
    """
    q_ker, k_ker = maps["q"], maps["k"]
    heads_k = _heads(w_key.shape[0], q_ker, maps, "rows of the key weight")
    e = q_ker.shape[1]
    w_hed = w_key.double().view(len(w_key) // e, e, -1).clone()
    w_hed[heads_k] = q_ker @ (k_ker.mT @ w_hed[heads_k])
    return w_hed.reshape(w_key.shape).to(w_key.dtype)


def effective_output(w_out_oi: Tensor, maps: Maps) -> Tensor:
    """The output projection's weight (o, i) under value-output `maps`; values stay dense.

    Wo_eff = Wo out blockdiag(v)^T, with zero columns at heads that went, where `maps` name the
    "heads" that stay. The bias does not change.

    Raises:
        ValueError: the weight does not have the maps' heads * e columns.
    """
    v_ker, out_ik = maps["v"], maps["out"]
    _check(w_out_oi.shape[1], out_ik.shape[0], "columns of the output weight")
    heads_k = _heads(w_out_oi.shape[1], v_ker, maps, "columns of the output weight")
    slim_ok = w_out_oi.double() @ out_ik
    result_ohe = torch.zeros_like(w_out_oi, dtype=torch.float64).unflatten(1, (-1, v_ker.shape[1]))
    kept_oke = (slim_ok @ torch.block_diag(*v_ker).mT).unflatten(1, (-1, v_ker.shape[1]))
    result_ohe[:, heads_k] = kept_oke
    return result_ohe.flatten(1).to(w_out_oi.dtype)


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


def effective_product(w_oi: Tensor, maps: Maps) -> Tensor:
    """The weight (o, i) of a layer under its factors."""
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


def _heads(inner: int, map_ker: Tensor, maps: Maps, what: str) -> Tensor:
    """Which heads the maps are of, (k,): all of them unless they name some."""
    if "heads" in maps:
        _check(inner % map_ker.shape[1], 0, f"{what} beyond whole heads")
        return maps["heads"]
    _check(inner, map_ker.shape[0] * map_ker.shape[1], what)
    return torch.arange(len(map_ker), device=map_ker.device)


def _check(actual: int, expected: int, what: str) -> None:
    if actual != expected:
        raise ValueError(f"{actual} {what}, but the maps are for {expected}")
