import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimdiff.errors import SlimdiffError
from slimdiff.prompts import influence, read_prompts, select, write_prompts

quick = settings(max_examples=30, deadline=None)


def signatures(pool: int, features: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(pool, features, generator=generator, dtype=torch.float64)


def leverage_matrix(rows_pk: Tensor, ridge: float) -> Tensor:
    moment_kk = rows_pk.mT @ rows_pk
    level = ridge * float(moment_kk.trace()) / min(rows_pk.shape)
    return rows_pk @ torch.linalg.solve(
        moment_kk + level * torch.eye(rows_pk.shape[1], dtype=torch.float64), rows_pk.mT
    )


def greedy_logdet(matrix_pp: Tensor, n: int) -> list[int]:
    """The definition: at each step the row that makes the determinant largest."""
    chosen: list[int] = []
    for _ in range(n):
        rest = [row for row in range(len(matrix_pp)) if row not in chosen]
        values = [torch.logdet(matrix_pp[[*chosen, r]][:, [*chosen, r]]) for r in rest]
        chosen.append(rest[int(torch.stack(values).argmax())])
    return chosen


sizes = st.tuples(st.integers(2, 9), st.integers(2, 7), st.integers(0, 10**6))


@quick
@given(sizes, st.sampled_from([1e-3, 0.1, 1.0]))
def test_influence_is_the_ridge_leverage(size, ridge):
    rows = signatures(*size)
    scores = influence(rows, ridge)
    torch.testing.assert_close(scores, leverage_matrix(rows, ridge).diagonal())
    assert 0 <= scores.min() and scores.max() < 1
    torch.testing.assert_close(influence(rows * 1e-9, ridge), scores)


@quick
@given(sizes)
def test_select_is_greedy_logdet(size):
    rows = signatures(*size)
    n = min(rows.shape)
    chosen = select(rows, n, ridge=0.1)
    assert chosen.order == greedy_logdet(leverage_matrix(rows, 0.1), n)
    torch.testing.assert_close(
        torch.tensor(chosen.scores, dtype=torch.float64), influence(rows)[chosen.order]
    )


@quick
@given(sizes, st.lists(st.integers(0, 100), max_size=8), st.data())
def test_copies_wait_until_every_distinct_signature_is_taken(size, repeats, data):
    distinct = signatures(*size)
    kinds = [*range(len(distinct)), *(r % len(distinct) for r in repeats)]
    kinds = data.draw(st.permutations(kinds))
    order = select(distinct[kinds], len(kinds)).order
    assert sorted(order) == list(range(len(kinds)))
    assert len({kinds[row] for row in order[: len(distinct)]}) == len(distinct)


@quick
@given(sizes, st.data())
def test_order_is_deterministic_and_a_prefix_of_a_longer_one(size, data):
    rows = signatures(*size)
    n = data.draw(st.integers(1, len(rows)))
    order = select(rows, n).order
    assert order == select(rows.clone(), n).order == select(rows, len(rows)).order[:n]


def test_near_duplicates_are_not_taken_twice():
    distinct = torch.eye(6, dtype=torch.float64) * torch.arange(1, 7)
    nearly = distinct + 1e-3 * signatures(6, 6, seed=1)
    order = select(torch.cat([distinct, nearly]), 6).order
    assert sorted(row % 6 for row in order) == list(range(6))


def test_what_is_unlike_the_rest_scores_highest():
    rows = torch.ones(20, 4) + 0.01 * signatures(20, 4, seed=2)
    rows[13] = torch.tensor([3.0, -3.0, 0.0, 0.0])
    assert int(influence(rows).argmax()) == select(rows, 1).order[0] == 13


@pytest.mark.parametrize("n", [0, -1, 6])
def test_n_outside_the_pool(n):
    with pytest.raises(SlimdiffError, match=f"n is {n}, but the pool has 5 prompts"):
        select(signatures(5, 3, seed=0), n)


@pytest.mark.parametrize(
    ("rows", "ridge", "message"),
    [
        (torch.zeros(3, 2), 0.1, "all signatures are zero"),
        (torch.tensor([[1.0, 2.0], [math.nan, 0.0]]), 0.1, "prompt 1 is not finite"),
        (torch.ones(3), 0.1, r"shape \(3,\)"),
        (torch.ones(3, 2), 0.0, "ridge must be positive"),
    ],
)
def test_bad_signatures(rows, ridge, message):
    with pytest.raises(SlimdiffError, match=message):
        select(rows, 1, ridge)


def test_read_text_and_json(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("\ufeff# scenes\n\n  a red circle \r\na blue ring\n", encoding="utf-8")
    assert read_prompts(text) == ["a red circle", "a blue ring"]
    listed = tmp_path / "prompts.json"
    listed.write_text('["a red circle", " ", "caf\u00e9 # 2"]', encoding="utf-8")
    assert read_prompts(listed) == ["a red circle", "caf\u00e9 # 2"]


@quick
@given(st.lists(st.text(alphabet="ab \n\u00e9,", min_size=1).filter(str.strip), min_size=1))
def test_written_prompts_read_back(tmp_path_factory, prompts):
    folder = tmp_path_factory.mktemp("prompts") / "new"
    write_prompts(folder / "p.json", prompts)
    assert read_prompts(folder / "p.json") == [prompt.strip() for prompt in prompts]
    write_prompts(folder / "p.txt", prompts)
    assert read_prompts(folder / "p.txt") == [" ".join(prompt.split()) for prompt in prompts]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"missing.txt: cannot be read \(No such file"),
        ("empty.txt", b"\n # only a comment\n", "empty.txt: holds no prompt"),
        ("latin.txt", b"caf\xe9\n", r"latin.txt: not UTF-8 \(byte 3\)"),
        ("broken.json", b"[", "broken.json: not JSON"),
        ("object.json", b"[1]", "object.json: expected a JSON list of strings"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SlimdiffError, match=message):
        read_prompts(tmp_path / name)
