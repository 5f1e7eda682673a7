"""Whole heads of a low-rank attention layer: which go first, what is lost, and the maps."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from slimdiff import decompose
from test_decompose_attention import (
    EXACT,
    HEADS,
    INNER,
    OUT,
    TOKENS,
    E,
    full_moment,
    head_moments,
    pair_error,
    samples,
    split,
    weight,
)


def of_heads(x_ni: Tensor, heads: list[int], count: int = HEADS) -> Tensor:
    """(tokens, k * e): what some heads put out."""
    return split(x_ni, count)[heads].transpose(0, 1).flatten(1)


def least_squares(x_nk: Tensor, y_no: Tensor) -> Tensor:
    """What the best linear prediction of y from x leaves, |.|^2 in the mean."""
    if not x_nk.shape[1]:
        return y_no.square().sum() / len(y_no)
    left_no = y_no - x_nk @ torch.linalg.lstsq(x_nk, y_no, driver="gelsd").solution
    return left_no.square().sum() / len(y_no)


def slim_values(z_ni: Tensor, maps: dict[str, Tensor]) -> Tensor:
    z_hne = split(z_ni)[maps["heads"]]
    return (z_hne @ maps["v"]).transpose(0, 1).flatten(1)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), out=st.sampled_from([2, OUT, 20]))
def test_heads_go_in_the_order_of_brute_force(seed: int, out: int) -> None:
    """Each time the head goes whose absence, after a refit of the others, costs least."""
    z_ni, w_oi = samples(seed), weight(seed, out)
    order_h, lost = decompose.head_order(w_oi, full_moment(z_ni), HEADS, damping=EXACT)
    y_no = z_ni @ w_oi.mT
    left, expected = list(range(HEADS)), []
    while len(left) > 1:
        errors = [least_squares(of_heads(z_ni, [h for h in left if h != g]), y_no) for g in left]
        best = min(range(len(left)), key=lambda i: float(errors[i]))
        assert int(order_h[len(left) - 1]) == left[best]
        left.pop(best)
        expected.append(float(errors[best]))
    assert left == order_h[:1].tolist()
    assert lost[0] == 0 and lost[1:] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["zero columns", "a copy", "silent"])
@pytest.mark.parametrize("dead", range(HEADS))
def test_a_dead_head_goes_first_and_costs_nothing(kind: str, dead: int) -> None:
    z_ni, w_oi = samples(3), weight(4)
    own = slice(dead * E, (dead + 1) * E)
    if kind == "zero columns":
        w_oi[:, own] = 0
    elif kind == "silent":
        z_ni[:, own] = 0
    else:
        twin = (dead + 1) % HEADS
        z_ni[:, own] = z_ni[:, twin * E : (twin + 1) * E]
    order_h, lost = decompose.head_order(w_oi, full_moment(z_ni), HEADS)
    first = int(order_h[-1])
    assert first == dead or (kind == "a copy" and first == twin)
    energy = float((z_ni @ w_oi.mT).square().sum() / TOKENS)
    assert lost[1] < 1e-4 * energy < 1e-1 * lost[2]
    stopped = decompose.head_order(w_oi, full_moment(z_ni), HEADS, largest=lost[2] * 0.99)
    assert stopped.lost == lost[:2] and int(stopped.order_b[-1]) == first
    assert sorted(stopped.order_b.tolist()) == list(range(HEADS))


def found_of(
    q_ni: Tensor, z_ni: Tensor, w_oi: Tensor, damping: float = decompose.DAMPING
) -> tuple[decompose.QueryKey, decompose.ValueOutput]:
    query_key = decompose.query_key(head_moments(q_ni), head_moments(z_ni))
    moment_ii = full_moment(z_ni)
    return query_key, decompose.value_output(w_oi, moment_ii, HEADS, refit=True, damping=damping)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    kept=st.sets(st.integers(0, HEADS - 1), min_size=1),
    width=st.integers(1, E),
)
def test_values_of_some_heads_are_the_least_squares_solution(
    seed: int, kept: set[int], width: int
) -> None:
    z_ni, w_oi, heads_k = samples(seed), weight(seed), torch.tensor(sorted(kept))
    query_key, found = found_of(z_ni, z_ni, w_oi, EXACT)
    maps = decompose.maps_of_heads(found, heads_k, width)
    z_slim, y_no = slim_values(z_ni, maps), z_ni @ w_oi.mT
    measured = (y_no - z_slim @ (w_oi @ maps["out"]).mT).square().sum() / TOKENS
    by_width = decompose.head_errors(query_key, w_oi, full_moment(z_ni), EXACT).of(heads_k)[1]
    scale = float(found.errors[0])
    expected = least_squares(z_slim, y_no)
    assert_close(measured, expected, rtol=1e-5, atol=1e-10 * scale)
    assert_close(by_width[width], measured, rtol=1e-5, atol=1e-10 * scale)
    effective_oi = decompose.effective_output(w_oi, maps)
    assert_close(z_ni @ effective_oi.mT, z_slim @ (w_oi @ maps["out"]).mT)
    gone = [h for h in range(HEADS) if h not in kept]
    assert not effective_oi.unflatten(1, (HEADS, E))[:, gone].any()


@pytest.mark.parametrize("width", range(1, E + 1))
@pytest.mark.parametrize("kept", [[1], [0, 2], [0, 1, 2]])
def test_logits_of_heads_that_went_do_not_matter(kept: list[int], width: int) -> None:
    q_ni, k_ni, heads_k = samples(0), samples(1, tokens=40), torch.tensor(kept)
    found = decompose.query_key(head_moments(q_ni), head_moments(k_ni))
    by_width = decompose.head_errors(found, weight(0), full_moment(samples(2))).of(heads_k)[0]
    maps = decompose.maps_of_heads(found, heads_k, width)
    q_hne, k_hne = split(q_ni)[kept], split(k_ni)[kept]
    slim_hnn = (q_hne @ maps["q"]) @ (k_hne @ maps["k"]).mT
    measured = (q_hne @ k_hne.mT - slim_hnn).square().mean((1, 2)).sum()
    assert_close(by_width[width], measured, rtol=1e-6, atol=1e-11)
    w_id, bias_i, c_nd = torch.randn(INNER, 4).double(), torch.randn(INNER).double(), samples(3)
    w_eff, bias_eff = (decompose.effective_key(x, maps) for x in (w_id, bias_i))
    keys_hne = split(c_nd[:, :4] @ w_eff.mT + bias_eff)[kept]
    slim_hnr = split(c_nd[:, :4] @ w_id.mT + bias_i)[kept] @ maps["k"]
    assert_close(q_hne @ keys_hne.mT, (q_hne @ maps["q"]) @ slim_hnr.mT)


def test_all_heads_are_as_without_a_choice() -> None:
    q_ni, z_ni, w_oi = samples(0), samples(1), weight(2)
    both, every = found_of(q_ni, z_ni, w_oi), torch.arange(HEADS)
    for width in range(1, E + 1):
        for found in both:
            maps, chosen = found.maps(width), decompose.maps_of_heads(found, every, width)
            for name, value in maps.items():
                assert_close(chosen[name], value, rtol=1e-6, atol=1e-8)
    errors = decompose.head_errors(both[0], w_oi, full_moment(z_ni)).of(every)
    for found, by_width in zip(both, errors, strict=True):
        assert_close(by_width, found.errors, rtol=1e-8, atol=1e-12)
    assert_close(pair_error(q_ni, z_ni, both[0].maps(2)), errors[0][2], rtol=1e-6, atol=1e-12)


def test_fewer_heads_and_narrower_ones_never_lose_less() -> None:
    both, w_oi = found_of(samples(0), samples(1), weight(2)), weight(2)
    order_h, lost = decompose.head_order(w_oi, both[1].moment, HEADS)
    errors = decompose.head_errors(both[0], w_oi, both[1].moment)
    found = {count: errors.of(order_h[:count]) for count in range(1, HEADS + 1)}
    for count, (_, values) in found.items():
        assert (values[:-1] >= values[1:]).all()
        assert float(values[E]) == pytest.approx(lost[HEADS - count], rel=1e-6, abs=1e-9)
    for fewer, more in itertools.pairwise(range(1, HEADS + 1)):
        assert (found[fewer][1] >= found[more][1] * (1 - 1e-9)).all()
        assert (found[fewer][0] <= found[more][0] * (1 + 1e-9)).all()


@pytest.mark.parametrize("tokens", [0, 3])
def test_singular_moments_give_finite_maps(tokens: int) -> None:
    z_ni, w_oi = samples(5), weight(0)
    moment_ii = full_moment(z_ni[:tokens]) if tokens else torch.zeros(INNER, INNER).double()
    order_h, lost = decompose.head_order(w_oi, moment_ii, HEADS)
    assert sorted(order_h.tolist()) == list(range(HEADS))
    found = decompose.value_output(w_oi, moment_ii, HEADS, refit=True)
    logits = decompose.query_key(head_moments(z_ni), head_moments(z_ni))
    errors = decompose.head_errors(logits, w_oi, moment_ii)
    assert all(both.isfinite().all() for both in errors.of(order_h[:2]))
    for count, width in itertools.product(range(1, HEADS + 1), range(1, E + 1)):
        maps = decompose.maps_of_heads(found, order_h[:count].sort().values, width)
        assert all(value.isfinite().all() for value in maps.values())
        assert maps["out"].abs().max() < 1e6
    assert all(0 <= a <= b for a, b in itertools.pairwise(lost))


def test_what_cannot_be_is_refused() -> None:
    w_oi, moment_ii = weight(0), full_moment(samples(0))
    with pytest.raises(ValueError, match="heads = 4"):
        decompose.head_order(w_oi, moment_ii, 4)
    apart = decompose.value_output(w_oi, moment_ii, HEADS, refit=False)
    with pytest.raises(ValueError, match="refit jointly"):
        decompose.maps_of_heads(apart, torch.tensor([0]), 2)
    with pytest.raises(ValueError, match="within 1 .. 5, got 0"):
        decompose.maps_of_heads(apart, torch.tensor([0]), 0)
