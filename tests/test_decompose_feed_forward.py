import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from slimdiff import decompose
from slimdiff.decompose import linalg

F, OUT, TOKENS = 20, 6, 120
EXACT = 1e-13  # damping too small to see
ORDERS = ["elimination", "leverage", "magnitude"]


def hidden(seed: int, units: int = F, tokens: int = TOKENS) -> Tensor:
    """Activations (tokens, units) after a GELU, correlated through fewer latent channels."""
    generator = torch.Generator().manual_seed(seed)
    latent_nk = torch.randn(tokens, max(units // 3, 1), generator=generator)
    mix_kf = torch.randn(latent_nk.shape[1], units, generator=generator)
    noise_nf = 0.2 * torch.randn(tokens, units, generator=generator)
    return torch.nn.functional.gelu(latent_nk @ mix_kf + noise_nf).double()


def weight(seed: int, units: int = F, out: int = OUT) -> Tensor:
    return torch.randn(out, units, generator=torch.Generator().manual_seed(seed)).double()


def moment(h_nf: Tensor) -> Tensor:
    return h_nf.mT @ h_nf / len(h_nf)


def decomposed(h_nf: Tensor, w_of: Tensor, order="elimination", **options) -> decompose.FeedForward:
    return decompose.feed_forward(
        w_of, moment(h_nf), order=order, magnitude_f=h_nf.abs().mean(0), **options
    )


def removed(units_r: Tensor, total: int = F) -> Tensor:
    return torch.tensor([unit for unit in range(total) if unit not in units_r.tolist()]).long()


def slim_output(h_nf: Tensor, w_of: Tensor, maps: dict[str, Tensor]) -> Tensor:
    units_r = maps["units"]
    removed_t = removed(units_r, h_nf.shape[1])
    return h_nf[:, units_r] @ (w_of[:, units_r] + w_of[:, removed_t] @ maps["coupling"]).mT


def naive_order(w_of: Tensor, c_ff: Tensor) -> list[int]:
    """Optimal brain surgeon from scratch at every step, the last unit to go first."""
    left, gone = list(range(len(c_ff))), []
    while left:
        inverse = torch.linalg.inv(c_ff[left][:, left])
        refitted = w_of @ c_ff[:, left] @ inverse
        score = refitted.square().sum(0) / inverse.diagonal()
        gone.append(left.pop(int(score.argmin())))
    return gone[::-1]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("width", [0, 1, 7, 13, 19, 20])
def test_error_is_the_measured_one(order, refit, width):
    h_nf, w_of = hidden(0), weight(1)
    found = decomposed(h_nf, w_of, order, refit=refit, damping=EXACT)
    maps = found.maps(width)
    measured = (h_nf @ w_of.mT - slim_output(h_nf, w_of, maps)).square().sum() / TOKENS
    assert_close(found.errors[width], measured, rtol=1e-6, atol=1e-10)
    assert maps["units"].dtype == torch.int64 and maps["coupling"].dtype == torch.float64
    assert torch.equal(maps["units"], maps["units"].sort().values)
    assert maps["coupling"].shape == (F - width, width)
    assert refit or not maps["coupling"].any()


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10**6))
def test_refit_curve_is_the_least_squares_error_of_every_width(seed):
    h_nf, w_of = hidden(seed), weight(seed)
    found = decomposed(h_nf, w_of, damping=EXACT)
    y_no = h_nf @ w_of.mT
    for width in range(1, F + 1):
        kept_nr = h_nf[:, found.maps(width)["units"]]
        fit_ro = torch.linalg.lstsq(kept_nr, y_no).solution
        expected = (y_no - kept_nr @ fit_ro).square().sum() / TOKENS
        assert_close(found.errors[width], expected, rtol=1e-6, atol=1e-9)
    assert (found.errors[:-1] >= found.errors[1:]).all() and found.errors[-1] == 0


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    units=st.integers(1, 24),
    round_size=st.integers(1, 9),
    out=st.integers(1, 30),
)
def test_elimination_is_exactly_greedy_when_all_units_compete(seed, units, round_size, out):
    h_nf, w_of = hidden(seed, units), weight(seed, units, out)
    c_ff = linalg.damped(moment(h_nf), 1e-6)
    order_f = decompose.elimination_order(w_of, c_ff, round_size=round_size, candidates=24)
    assert order_f.tolist() == naive_order(w_of, c_ff)


def test_elimination_with_few_candidates_is_nearly_greedy():
    h_nf, w_of = hidden(0, 96, 400), weight(1, 96, 24)
    c_ff = linalg.damped(moment(h_nf), 1e-6)
    few_f = decompose.elimination_order(w_of, c_ff, round_size=8, candidates=32)
    assert sorted(few_f.tolist()) == list(range(96))
    few, greedy = (
        decomposed(h_nf, w_of, order).errors[20:80]
        for order in (few_f, torch.tensor(naive_order(w_of, c_ff)))
    )
    assert (few <= greedy * 1.05).all()


def test_elimination_beats_leverage_beats_chance():
    h_nf, w_of = hidden(0, 96, 400), weight(1, 96, 24)
    generator = torch.Generator().manual_seed(2)
    chance = [decomposed(h_nf, w_of, torch.randperm(96, generator=generator)) for _ in range(5)]
    for width in (72, 48, 32):
        elimination = decomposed(h_nf, w_of).errors[width]
        leverage = decomposed(h_nf, w_of, "leverage").errors[width]
        random = torch.stack([found.errors[width] for found in chance]).median()
        assert elimination < leverage < random


def test_leverage_follows_its_definition():
    h_nf, w_of = hidden(0), weight(1)
    c_ff = moment(h_nf)
    for ridge in (0.1, 1.0):
        ridge_ff = ridge * torch.linalg.eigvalsh(c_ff).mean() * torch.eye(F)
        score_f = (c_ff @ torch.linalg.inv(c_ff + ridge_ff)).diagonal()
        found = decompose.unit_order(w_of, c_ff, "leverage", leverage_ridge=ridge)
        assert found.tolist() == score_f.argsort(descending=True).tolist()


def test_magnitude_keeps_the_largest():
    h_nf, w_of = hidden(0), weight(1)
    kept = decomposed(h_nf, w_of, "magnitude").maps(4)["units"]
    assert h_nf.abs().mean(0)[kept].min() >= h_nf.abs().mean(0)[removed(kept)].max()


def test_an_order_known_already_is_used_as_it_is():
    h_nf, w_of = hidden(0), weight(1)
    first = decomposed(h_nf, w_of)
    again = decomposed(h_nf, w_of, first.order_f)
    assert torch.equal(again.order_f, first.order_f)
    assert_close(again.maps(9)["coupling"], first.maps(9)["coupling"])


def test_refit_is_never_worse():
    h_nf, w_of = hidden(0), weight(1)
    for order in ORDERS:
        plain = decomposed(h_nf, w_of, order, refit=False)
        refit = decomposed(h_nf, w_of, plain.order_f, damping=EXACT)
        assert (refit.errors <= plain.errors * (1 + 1e-9)).all()


def test_full_width_is_an_exact_identity():
    maps = decomposed(hidden(0), weight(1)).maps(F)
    assert maps["units"].tolist() == list(range(F))
    assert maps["coupling"].shape == (0, F)


def test_copies_and_dead_units_go_first_and_cost_nothing():
    h_nf = hidden(0, 12)
    h_nf = torch.cat([h_nf, h_nf[:, :3], torch.zeros(TOKENS, 2).double()], 1)
    found = decomposed(h_nf, weight(1, 17))
    assert found.missing == 5 and found.singular
    assert found.errors[12] < 1e-2 * found.errors[11]
    kept = set(found.maps(12)["units"].tolist())
    assert not kept & {15, 16}
    assert all(len(kept & {i, i + 12}) == 1 for i in range(3))
    assert not decomposed(hidden(0), weight(1)).singular


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("kind", ["zero", "few tokens", "copies", "dead"])
def test_degenerate_moments_give_finite_maps(order, damping, kind):
    h_nf = hidden(0)
    if kind == "copies":
        h_nf[:, F // 2 :] = h_nf[:, : F // 2]
    h_nf = h_nf[:5] if kind == "few tokens" else h_nf
    h_nf = h_nf * 0 if kind == "zero" else h_nf
    h_nf[:, 3] = 0 if kind == "dead" else h_nf[:, 3]
    w_of = weight(1)
    found = decomposed(h_nf, w_of, order, damping=damping)
    assert found.singular
    assert sorted(found.order_f.tolist()) == list(range(F))
    for width in range(F + 1):
        maps = found.maps(width)
        assert maps["coupling"].isfinite().all()
        measured = (h_nf @ w_of.mT - slim_output(h_nf, w_of, maps)).square().sum() / len(h_nf)
        rounding = 1e-4 * float(found.errors[0]) + 1e-90
        assert_close(found.errors[width], measured, rtol=1e-4, atol=rounding)


def test_effective_down_reproduces_the_slim_output():
    h_nf, w_of = hidden(0), weight(1)
    maps = decomposed(h_nf, w_of).maps(8)
    effective_of = decompose.effective_down(w_of, maps)
    assert_close(h_nf @ effective_of.mT, slim_output(h_nf, w_of, maps))
    assert not effective_of[:, removed(maps["units"])].any()
    assert decompose.effective_down(w_of.half(), maps).dtype == torch.float16


def test_inputs_stay_and_results_are_float64():
    h_nf, w_of = hidden(0), weight(1).float()
    c_ff = moment(h_nf).float()
    before = c_ff.clone(), w_of.clone()
    for order in ORDERS:
        found = decompose.feed_forward(w_of, c_ff, order=order, magnitude_f=h_nf.abs().mean(0))
        assert found.errors.dtype == found.maps(5)["coupling"].dtype == torch.float64
    assert torch.equal(c_ff, before[0]) and torch.equal(w_of, before[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "size"}, "order must be one of .*'size'"),
        ({"order": "magnitude"}, "needs magnitude_f"),
        ({"order": "magnitude", "magnitude_f": torch.ones(3)}, r"\(3,\), expected \(20,\)"),
        ({"order": "leverage", "leverage_ridge": 0.0}, "must be positive, got 0.0"),
        ({"order": torch.zeros(F, dtype=torch.int64)}, "permutation of 20"),
        ({"order": "leverage", "damping": -1.0}, "got -1.0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        decompose.feed_forward(weight(0), moment(hidden(0)), **options)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"h_moment_ff is \(20, 20\), expected \(19, 19\)"):
        decompose.feed_forward(weight(0)[:, 1:], moment(hidden(0)), order="elimination")
    with pytest.raises(ValueError, match="19 columns of the down weight.* for 20"):
        decompose.effective_down(weight(0)[:, 1:], decomposed(hidden(0), weight(0)).maps(3))
