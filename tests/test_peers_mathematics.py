"""The mathematics of the benchmark's peers, on matrices."""

import torch

from peers.modegpt import column_selection
from peers.obs_diff import compensated, head_costs, surviving_heads
from peers.svd import plain_factors, two_linears, whitened_factors


def test_factors_of_full_rank_are_the_matrix():
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 20).double()
    root = torch.randn(12, 12, dtype=torch.float64)
    for a_or, b_ri in (
        plain_factors(linear.weight.detach(), 12),
        whitened_factors(linear.weight.detach(), root @ root.mT, 12),
    ):
        x = torch.randn(5, 12, dtype=torch.float64)
        torch.testing.assert_close(two_linears(linear, a_or, b_ri)(x), linear(x))


def test_whitened_error_is_what_was_truncated():
    torch.manual_seed(0)
    w_oi, root = (torch.randn(9, 7, dtype=torch.float64) for _ in range(2))
    c_ii = root.mT @ root
    a_or, b_ri = whitened_factors(w_oi, c_ii, 4)
    lost = torch.einsum("oi,ij,oj->", w_oi - a_or @ b_ri, c_ii, w_oi - a_or @ b_ri)
    tail = torch.linalg.svdvals(w_oi @ torch.linalg.cholesky(c_ii))[4:].square().sum()
    torch.testing.assert_close(lost, tail, rtol=1e-3, atol=0)


def heads_problem(heads=4, width=3):
    torch.manual_seed(0)
    inner = heads * width
    root = torch.randn(inner, inner, dtype=torch.float64)
    return torch.randn(5, inner, dtype=torch.float64), root @ root.mT / inner, heads, width


def test_head_cost_is_the_error_after_compensation():
    w_oi, c_ii, heads, width = heads_problem()
    cost_h = head_costs(w_oi, c_ii, heads)
    for gone in range(heads):
        kept_h = torch.tensor([h for h in range(heads) if h != gone])
        error_oi, plain_oi = w_oi.clone(), torch.zeros_like(w_oi)
        columns = (kept_h[:, None] * width + torch.arange(width)).flatten()
        error_oi[:, columns] -= compensated(w_oi, c_ii, heads, kept_h)
        gone_columns = slice(gone * width, (gone + 1) * width)
        plain_oi[:, gone_columns] = w_oi[:, gone_columns]
        lost, dropped = (torch.einsum("oi,ij,oj->", e, c_ii, e) for e in (error_oi, plain_oi))
        torch.testing.assert_close(lost, cost_h[gone], rtol=1e-3, atol=0)
        assert lost < dropped


def test_the_cheapest_head_goes_first():
    w_oi, c_ii, heads, width = heads_problem()
    w_oi[:, width : 2 * width] = 0
    assert surviving_heads(w_oi, c_ii, heads, 3).tolist() == [0, 2, 3]
    assert len(surviving_heads(w_oi, c_ii, heads, 1)) == 1


def test_column_selection_keeps_the_largest_scores():
    q = torch.diag_embed(torch.tensor([[1.0, 4.0, 9.0], [5.0, 1.0, 1.0]]))
    k = torch.diag_embed(torch.tensor([[9.0, 4.0, 1.0], [1.0, 1.0, 2.0]]))
    kept = column_selection(q, k, 1)
    assert kept.shape == (2, 3, 1)
    assert kept.argmax(1).flatten().tolist() == [1, 0]
