"""Low-rank modulations against a singular value decomposition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimdiff.decompose import effective_modulation, modulation


def case(outputs: int, inputs: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    few = torch.randn(rank, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(50, rank, generator=generator, dtype=torch.float64) @ few
    return weight, x


@given(
    outputs=st.integers(1, 12),
    inputs=st.integers(1, 12),
    rank=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_errors_are_those_of_the_best_low_rank_outputs(outputs, inputs, rank, seed):
    """Eckart-Young on the outputs themselves, which the decomposition never sees."""
    weight, x = case(outputs, inputs, rank, seed)
    found = modulation(weight, x.T @ x / len(x))
    outputs_no = x @ weight.T
    sigma = torch.linalg.svdvals(outputs_no)
    total = float(outputs_no.square().sum()) / len(x)
    for width in range(found.width + 1):
        best = float(sigma[width:].square().sum()) / len(x)
        assert float(found.errors[width]) == pytest.approx(best, rel=1e-6, abs=1e-9 * total)
        if 0 < width < found.width:
            effective = effective_modulation(weight, found.maps(width))
            measured = float((outputs_no - x @ effective.T).square().sum()) / len(x)
            assert measured == pytest.approx(best, rel=1e-5, abs=1e-9 * total)


def test_full_rank_is_the_weight_itself():
    weight, x = case(6, 4, 4, 0)
    maps = modulation(weight, x.T @ x).maps(4)
    assert set(maps) == {"weight"} and torch.equal(maps["weight"], weight)


def test_factors_never_outgrow_the_weight():
    weight, x = case(9, 7, 3, 1)
    maps = modulation(weight, x.T @ x).maps(3)
    norm = torch.linalg.matrix_norm(maps["projection"], 2)
    assert norm <= torch.linalg.matrix_norm(weight, 2) * (1 + 1e-9)
    torch.testing.assert_close(maps["weight"].T @ maps["weight"], torch.eye(3).double())


@pytest.mark.parametrize(
    ("weight", "moment", "message"),
    [
        (torch.ones(3), torch.eye(3), "weight_oi"),
        (torch.ones(2, 3), torch.eye(2), "moment_ii"),
        (torch.full((2, 2), torch.inf), torch.eye(2), "finite"),
    ],
)
def test_refusals(weight, moment, message):
    with pytest.raises(ValueError, match=message):
        modulation(weight, moment)
