import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from slimdiff.decompose import linalg


def moment(seed: int, size: int, rank: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_nk = torch.randn(size, rank, generator=generator, dtype=torch.float64) * scale
    return x_nk @ x_nk.mT / max(rank, 1)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 12),
    rank=st.integers(0, 16),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_triangular_factor_never_fails(seed, size, rank, scale):
    c_nn = moment(seed, size, rank, scale)
    l_nn = linalg.triangular_factor(c_nn)
    assert torch.equal(l_nn, l_nn.tril())
    assert (l_nn.diagonal() > 0).all()
    assert_close(l_nn @ l_nn.mT, c_nn, rtol=0, atol=1e-10 * float(c_nn.abs().max()) + 1e-90)


def test_triangular_factor_of_an_indefinite_matrix_is_the_nearest_definite_one():
    c_nn = moment(0, 6, 6)
    values_n, vectors_nn = torch.linalg.eigh(c_nn)
    values_n[0] = -1e-9
    indefinite_nn = vectors_nn * values_n @ vectors_nn.mT
    l_nn = linalg.triangular_factor(indefinite_nn)
    assert_close(l_nn @ l_nn.mT, indefinite_nn, rtol=0, atol=1.1e-9)
    assert torch.linalg.eigvalsh(l_nn @ l_nn.mT).min() > -1e-14


def test_one_singular_matrix_does_not_spoil_its_batch():
    batch_hnn = torch.stack([moment(0, 5, 5), moment(1, 5, 2), torch.zeros(5, 5).double()])
    l_hnn = linalg.triangular_factor(batch_hnn)
    assert_close(l_hnn @ l_hnn.mT, batch_hnn, rtol=0, atol=1e-10)


@pytest.mark.parametrize("strip", [3, 7, 100])
def test_inverse_of_factored(monkeypatch, strip):
    monkeypatch.setattr(linalg, "_STRIP", strip)
    c_nn = moment(0, 17, 40)
    inverse_nn = linalg.inverse_of_factored_(torch.linalg.cholesky(c_nn))
    assert_close(inverse_nn, torch.linalg.inv(c_nn), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 10), rank=st.integers(0, 10))
def test_symmetric_root_squares_to_the_moment_and_counts_what_is_missing(seed, size, rank):
    c_nn = moment(seed, size, rank)
    root_nn, missing = linalg.symmetric_root(c_nn)
    assert_close(root_nn, root_nn.mT)
    assert_close(root_nn @ root_nn, c_nn, rtol=0, atol=1e-10 * (1 + float(c_nn.abs().max())))
    assert missing == max(size - rank, 0)


@pytest.mark.parametrize(("rank", "expected"), [(9, 0), (5, 4), (0, 9)])
def test_missing_directions_sees_through_the_damping(rank, expected):
    c_nn = moment(3, 9, rank)
    l_nn = linalg.triangular_factor(linalg.damped(c_nn, 1e-6))
    assert linalg.missing_directions_(l_nn, linalg.ridge_of(c_nn, 1e-6)) == expected


def test_damping_grows_until_a_moment_rounded_below_zero_is_definite():
    c_nn = moment(3, 9, 4)
    assert linalg.definite_damping(c_nn, 1e-6) == 1e-6
    values_n, vectors_nn = torch.linalg.eigh(c_nn)
    values_n[0] = -3e-5 * float(c_nn.diagonal().mean())
    rounded_nn = vectors_nn * values_n @ vectors_nn.mT
    assert linalg.definite_damping(rounded_nn, 1e-6) == pytest.approx(1e-4)
    assert linalg.definite_damping(-torch.eye(3).double(), 1e-6) == pytest.approx(1e-3)


def test_refit_curve_is_the_least_squares_error_of_every_prefix():
    generator = torch.Generator().manual_seed(0)
    x_tn = torch.randn(50, 8, generator=generator).double() @ moment(1, 8, 8)
    w_on = torch.randn(3, 8, generator=generator).double()
    curve = linalg.refit_curve(w_on, linalg.triangular_factor(x_tn.mT @ x_tn / 50))
    y_to = x_tn @ w_on.mT
    for kept in range(9):
        fit_ko = torch.linalg.lstsq(x_tn[:, :kept], y_to).solution if kept else y_to[:0]
        expected = (y_to - x_tn[:, :kept] @ fit_ko).square().sum() / 50
        assert_close(curve[kept], expected, rtol=1e-7, atol=1e-12)
    assert curve[8] == 0


def test_truncation_curve_is_the_energy_of_what_was_dropped():
    generator = torch.Generator().manual_seed(0)
    x_tn = torch.randn(50, 8, generator=generator).double() @ moment(1, 8, 8)
    w_on = torch.randn(3, 8, generator=generator).double()
    curve = linalg.truncation_curve(w_on, x_tn.mT @ x_tn / 50)
    for kept in range(9):
        expected = (x_tn[:, kept:] @ w_on[:, kept:].mT).square().sum() / 50
        assert_close(curve[kept], expected)


def test_negative_damping_is_refused():
    with pytest.raises(ValueError, match="-0.1"):
        linalg.damped(moment(0, 3, 3), -0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(bad):
    c_nn = moment(0, 3, 3)
    c_nn[1, 2] = bad
    with pytest.raises(ValueError, match="to_out holds infinities or NaN"):
        linalg.checked_moment(c_nn, "to_out", (3, 3))


def test_raised_factor_raises_the_ridge_until_the_matrix_is_definite():
    calls = []

    def indefinite() -> torch.Tensor:
        calls.append(1)
        return torch.diag(torch.tensor([1.0, 1.0, -0.05], dtype=torch.float64))

    factor, damping = linalg.raised_factor(indefinite, 0.65, 1e-3)
    assert damping == pytest.approx(0.1) and len(calls) == 3
    ridge = torch.diag(torch.full((3,), 0.065, dtype=torch.float64))
    assert_close(factor @ factor.mT, indefinite() + ridge)
    assert torch.equal(factor, factor.tril())
