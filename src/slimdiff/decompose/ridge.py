"""Ridge regression towards present weights, its strength chosen on rows that were not fitted.

The loss is sum_n w_n |r_n - g_n * (step^T x_n)|^2 with what is lacking r, a gate g for each output
(1 where there is none), and row weights w.

Shape letters: `n` rows, `i` inputs (a convolution's taps and the bias among them), `o` outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4)
"""Ridges that are tried, from strong to weak, as multiples of the moment's diagonal."""

TOGETHER = 4096
"""Rows that are multiplied at once: their products are float32, sums of products float64."""


@dataclass(frozen=True)
class Rows:
    """Rows of a regression: inputs (n, i), what is lacking (n, o), gates (n, o), weights (n,)."""

    x_ni: Tensor
    r_no: Tensor
    g_no: Tensor | None = None
    w_n: Tensor | None = None

    def losses(self, step_io: Tensor | None = None) -> Tensor:
        """The loss of a step at each output (o,), float64; of none, what is lacking now."""
        r_no = self.r_no
        if step_io is not None:
            y_no = self.x_ni @ step_io.to(self.x_ni)
            r_no = r_no - (y_no if self.g_no is None else self.g_no * y_no)
        squared_no = r_no.square()
        if self.w_n is not None:
            squared_no = self.w_n[:, None] * squared_no
        return squared_no.sum(0, dtype=torch.float64)


class Moments:
    """Sums over rows in float64: of x x^T (i, i), of x (g r)^T (i, o), and of squared gates (o).

    Gates differ from row to row and from output to output. The moment of each output would be one
    of its own; they are taken for one, each row weighted by its mean squared gate, each output
    scaled by its own. That is exact where squared gates are products of both, as without gates.
    """

    def __init__(self) -> None:
        self._waiting: list[Rows] = []
        self._sums: list[Tensor] = []

    def add(self, rows: Rows) -> None:
        """Add rows, of the same inputs and outputs each time."""
        self._waiting.append(rows)
        if sum(len(own.x_ni) for own in self._waiting) >= TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Add what waits."""
        if not self._waiting:
            return
        added = _products(joined(self._waiting))
        self._waiting = []
        if self._sums:
            for total, own in zip(self._sums, added, strict=True):
                total += own
        else:
            self._sums = added

    @property
    def normal(self) -> tuple[Tensor, Tensor]:
        """C (i, i) and B (i, o) of the normal equation C step = B."""
        self.flush()
        c_ii, b_io, gates_o, total = self._sums
        return c_ii, b_io / (gates_o / total).clamp_min(1e-12)


def joined(rows: Sequence[Rows]) -> Rows:
    """All rows in one."""
    g, w = [own.g_no for own in rows], [own.w_n for own in rows]
    return Rows(
        torch.cat([own.x_ni for own in rows]),
        torch.cat([own.r_no for own in rows]),
        None if g[0] is None else torch.cat([own for own in g if own is not None]),
        None if w[0] is None else torch.cat([own for own in w if own is not None]),
    )


def _products(rows: Rows) -> list[Tensor]:
    x_ni, r_no = rows.x_ni, rows.r_no
    w_n = x_ni.new_ones(len(x_ni)) if rows.w_n is None else rows.w_n.to(x_ni)
    g_no = torch.ones_like(r_no) if rows.g_no is None else rows.g_no
    mean_n = w_n * g_no.square().mean(1)
    lacking_no = w_n[:, None] * g_no * r_no
    sums = (
        x_ni.mT @ (mean_n[:, None] * x_ni),
        x_ni.mT @ lacking_no,
        (w_n[:, None] * g_no.square()).sum(0),
        mean_n.sum(),
    )
    return [own.double() for own in sums]


def ridge_step(c_ii: Tensor, b_io: Tensor, strength: float) -> Tensor:
    """The step (i, o) with (C + strength diag(C)) step = B.

    It minimises the loss plus `strength` times sum_i C_ii |step_i|^2. Inputs are brought to equal
    energy first, so their scales do not matter; those that never occurred get no weight, and a
    singular moment is definite under any ridge above rounding. No step where it is not.
    """
    scale_i = c_ii.diagonal().clamp_min(0.0).sqrt()
    scale_i = torch.where(scale_i > 0, scale_i, 1.0)
    s_ii = c_ii / scale_i[:, None] / scale_i
    s_ii.diagonal().add_(strength)
    factor_ii, failed = torch.linalg.cholesky_ex(s_ii)
    if bool(failed.any()):
        return torch.zeros_like(b_io)
    return torch.cholesky_solve(b_io / scale_i[:, None], factor_ii) / scale_i[:, None]


@dataclass(frozen=True)
class Step:
    """What is added to a layer's weights.

    Attributes:
        step_io: (inputs, outputs), float64; None where the weights stay as they are.
        strength: of the ridge, if any.
        before, after: loss on the held-out rows.
    """

    step_io: Tensor | None
    strength: float | None
    before: float
    after: float


Allowed = Callable[[Tensor, Tensor], Tensor]
"""Any step (i, o) and the moment (i, i) of the inputs -> the step to take in its place."""


def chosen_steps(
    fitted: Moments,
    held_out: Rows,
    outputs: Sequence[int],
    allowed: Allowed | None = None,
    strengths: Sequence[float] = STRENGTHS,
) -> list[Step]:
    """Ridge steps of several layers of the same inputs, each of the strength that loses least on
    held-out rows, or none.

    Strengths are tried in turn until the loss rises for every layer.

    Args:
        fitted: moments of the rows to solve on; outputs of the layers stand side by side.
        held_out: other rows of the same.
        outputs: how many are whose.
        allowed: limits the steps.
        strengths: of the ridge.
    """
    c_ii, b_io = fitted.normal
    before = [float(own.sum()) for own in held_out.losses().split(list(outputs))]
    best = [Step(None, None, loss, loss) for loss in before]
    for strength in strengths if any(before) else ():
        step_io = ridge_step(c_ii, b_io, strength)
        step_io = step_io if allowed is None else allowed(step_io, c_ii)
        after = [float(own.sum()) for own in held_out.losses(step_io).split(list(outputs))]
        found = [
            Step(own_io.contiguous(), strength, old, new) if new < step.after else step
            for own_io, old, new, step in zip(
                step_io.split(list(outputs), 1), before, after, best, strict=True
            )
        ]
        if all(new is old for new, old in zip(found, best, strict=True)):
            break
        best = found
    return best
