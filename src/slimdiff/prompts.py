"""Prompts: reading them from a file, and choosing the few that say most about a pool.

Each prompt of a pool has a signature, a row of features of how the denoiser responds to it. Its
spectral influence score is its ridge leverage, s(p)^T (S + l I)^-1 s(p) with S the sum of
s(p) s(p)^T over the pool: near 1 when nothing else in the pool is like it, small when much is.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from slimdiff.errors import SlimdiffError

EXHAUSTED = 1e-10  # of the largest score: what is left of a signature is rounding


class Selection(NamedTuple):
    """What `select` chose.

    Attributes:
        order: rows of the pool, most informative first.
        scores: the spectral influence score, in (0, 1), of each row in `order`.
    """

    order: list[int]
    scores: list[float]


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, in its order.

    A `.json` file holds a list of strings; any other is text with one prompt per line, where blank
    lines and lines that start with `#` are skipped.

    Raises:
        SlimdiffError: the file is missing, not UTF-8, not a list of strings, or holds no prompt.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SlimdiffError(
            f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8 text, one prompt per line"
        ) from error
    except OSError as error:
        raise SlimdiffError(
            f"{path}: cannot be read ({error.strerror}); expected a text file, one prompt per line"
        ) from error
    prompts = _from_json(path, text) if path.suffix == ".json" else _from_lines(text)
    if not prompts:
        raise SlimdiffError(f"{path}: holds no prompt; write one per line ('#' starts a comment)")
    return prompts


def write_prompts(path: str | Path, prompts: list[str]) -> None:
    """Write what `read_prompts` reads; line breaks inside a prompt become blanks in a text file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        text = json.dumps(prompts, indent=1, ensure_ascii=False)
    else:
        text = "\n".join(" ".join(prompt.split()) for prompt in prompts)
    path.write_text(text + "\n", encoding="utf-8")


def influence(signatures_pk: Tensor, ridge: float = 0.1) -> Tensor:
    """Spectral influence score of every prompt of a pool.

    Args:
        signatures_pk: one row of k features for each of p prompts; any scale.
        ridge: l as a multiple of the mean eigenvalue of the pool's second moment.

    Returns:
        (p,) float64, each in [0, 1).

    Raises:
        SlimdiffError: not a matrix, not finite, all zero, or `ridge` is not positive.
    """
    return _whitened(signatures_pk, ridge).square().sum(1)


def select(signatures_pk: Tensor, n: int, ridge: float = 0.1) -> Selection:
    """Choose `n` prompts that together span the pool: greedy log-determinant maximisation.

    This is pivoted Cholesky on the matrix whose diagonal is `influence`: each step takes the prompt
    of largest residual score, and what it explains leaves all other residuals. Once the chosen
    span all features, a new round starts over the rest. Copies of one signature are taken twice
    only when every distinct one is taken. Ties go to the earlier row.

    Args:
        signatures_pk: one row of k features for each of p prompts.
        n: how many to choose, at most p.
        ridge: as in `influence`.

    Raises:
        SlimdiffError: `n` is not between 1 and p, or as in `influence`.
    """
    pool = signatures_pk.shape[0]
    if not 1 <= n <= pool:
        raise SlimdiffError(
            f"n is {n}, but the pool has {pool} prompts; choose 1 to {pool}, or give a larger pool"
        )
    factor_pk = _whitened(signatures_pk, ridge)
    copies_p = _copy_numbers(signatures_pk)
    order: list[int] = []
    for copy in range(int(copies_p.max()) + 1):
        free_p = copies_p == copy
        while len(order) < n and free_p.any():
            order += _pivots(factor_pk.clone(), free_p, n - len(order))
    scores_p = factor_pk.square().sum(1)
    return Selection(order, scores_p[order].tolist())


def _pivots(residual_pk: Tensor, free_p: Tensor, n: int) -> list[int]:
    """Up to `n` pivots; `residual_pk` and `free_p` are used up.

    Stops when the residuals of the free rows are rounding, after at least one pivot.
    """
    order: list[int] = []
    floor = EXHAUSTED * float(residual_pk.square().sum(1).max())
    while len(order) < n and free_p.any():
        residual_p = residual_pk.square().sum(1).masked_fill(~free_p, -1)
        pivot = int(residual_p.argmax())
        exhausted = float(residual_p[pivot]) <= floor
        if exhausted and order:
            break
        order.append(pivot)
        free_p[pivot] = False
        if not exhausted:
            direction_k = residual_pk[pivot] / residual_pk[pivot].norm()
            residual_pk -= torch.outer(residual_pk @ direction_k, direction_k)
    return order


def _whitened(signatures_pk: Tensor, ridge: float) -> Tensor:
    """Rows s(p)^T (S + l I)^-1/2, whose squared norms are the scores."""
    if signatures_pk.ndim != 2 or not signatures_pk.numel():
        raise SlimdiffError(
            f"signatures have shape {tuple(signatures_pk.shape)}, expected (prompts, features)"
        )
    if not ridge > 0:
        raise SlimdiffError(f"ridge must be positive, got {ridge}")
    bad_p = ~signatures_pk.isfinite().all(1)
    if bad_p.any():
        raise SlimdiffError(
            f"the signature of prompt {int(bad_p.int().argmax())} is not finite; does the "
            f"denoiser overflow in its dtype? Record signatures in float32"
        )
    rows_pk = signatures_pk.double()
    rows_pk = rows_pk / rows_pk.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    evals_k, evecs_kk = torch.linalg.eigh(rows_pk.mT @ rows_pk)
    evals_k = evals_k.clamp_min(0)
    mean = float(evals_k.sum()) / min(rows_pk.shape)
    if mean == 0:
        raise SlimdiffError("all signatures are zero; were any activations recorded?")
    return (rows_pk @ evecs_kk) / (evals_k + ridge * mean).sqrt()


def _copy_numbers(signatures_pk: Tensor) -> Tensor:
    """How many earlier rows equal each row: 0 for the first of its kind."""
    _, kinds_p = signatures_pk.unique(dim=0, return_inverse=True)
    seen: Counter[int] = Counter()
    numbers = []
    for kind in kinds_p.tolist():
        numbers.append(seen[kind])
        seen[kind] += 1
    return torch.tensor(numbers)


def _from_lines(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _from_json(path: Path, text: str) -> list[str]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise SlimdiffError(f"{path}: not JSON ({error}); expected a list of strings") from error
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise SlimdiffError(f"{path}: expected a JSON list of strings, one prompt each")
    return [prompt.strip() for prompt in found if prompt.strip()]
