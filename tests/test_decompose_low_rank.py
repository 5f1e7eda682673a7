"""Low-rank modulations and projections against a singular value decomposition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimdiff.decompose import effective_product, modulation, projection
from slimdiff.decompose.low_rank import BALANCE


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
    from_outputs=st.booleans(),
)
def test_errors_are_those_of_the_best_low_rank_outputs(outputs, inputs, rank, seed, from_outputs):
    """Eckart-Young on the outputs themselves, which the decomposition never sees."""
    weight, x = case(outputs, inputs, rank, seed)
    outputs_no = x @ weight.T
    if from_outputs:
        found = projection(weight, outputs_no.T @ outputs_no / len(x))
    else:
        found = modulation(weight, x.T @ x / len(x))
    sigma = torch.linalg.svdvals(outputs_no)
    total = float(outputs_no.square().sum()) / len(x)
    for width in range(found.width + 1):
        best = float(sigma[width:].square().sum()) / len(x)
        assert float(found.errors[width]) == pytest.approx(best, rel=1e-6, abs=1e-9 * total)
        if 0 < width < found.width:
            effective = effective_product(weight, found.maps(width))
            measured = float((outputs_no - x @ effective.T).square().sum()) / len(x)
            assert measured == pytest.approx(best, rel=1e-5, abs=1e-9 * total)


@pytest.mark.parametrize("decomposed", [modulation, projection])
def test_full_rank_is_the_weight_itself(decomposed):
    weight, x = case(6, 6, 6, 0)
    maps = decomposed(weight, x.T @ x).maps(6)
    assert set(maps) == {"weight"} and torch.equal(maps["weight"], weight)


def test_directions_that_few_samples_never_saw_are_not_empty():
    weight, x = case(9, 12, 4, 1)
    outputs_no = x @ weight.T
    moment = outputs_no.T @ outputs_no
    energy = float(moment.trace())
    blind, careful = (projection(weight, moment, prior).errors for prior in (0.0, 0.2))
    assert float(blind[4]) < 1e-9 * energy and float(careful[8]) > 1e-4 * energy
    assert float(careful[0]) == pytest.approx(energy) == float(blind[0])
    white = projection(weight, moment, 1.0).errors / energy
    sigma = torch.linalg.svdvals(weight).square()
    torch.testing.assert_close(white[4], sigma[4:].sum() / sigma.sum())
    with pytest.raises(ValueError, match="prior"):
        projection(weight, moment, 1.5)


@pytest.mark.parametrize("decomposed", [modulation, projection])
def test_factors_never_outgrow_the_weight(decomposed):
    weight, x = case(7, 7, 3, 1)
    maps = decomposed(weight, x.T @ x).maps(3)
    norm = torch.linalg.matrix_norm(maps["projection"], 2)
    assert norm <= torch.linalg.matrix_norm(weight, 2) * BALANCE * (1 + 1e-9)
    gram = maps["weight"].T @ maps["weight"]
    torch.testing.assert_close(gram, float(gram[0, 0]) * torch.eye(3).double())
    assert BALANCE**-2 <= float(gram[0, 0]) * (1 + 1e-9) <= 1 + 1e-6


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


@pytest.mark.parametrize(
    ("weight", "moment", "message"),
    [
        (torch.ones(3, 3, 1), torch.eye(3), "weight_oi"),
        (torch.ones(2, 3), torch.eye(3), "moment_oo"),
        (torch.full((2, 2), torch.nan), torch.eye(2), "finite"),
    ],
)
def test_projections_refuse(weight, moment, message):
    with pytest.raises(ValueError, match=message):
        projection(weight, moment)
