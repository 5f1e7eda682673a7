"""The recorder: adds what passes through a denoiser's layers up into statistics.

No activation is kept: each call adds one Gram matrix per statistic to a sum and forgets its inputs.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slimdiff.decompose import autocovariances
from slimdiff.errors import SlimdiffError
from slimdiff.padding import Counting, Padding
from slimdiff.probes import Probes
from slimdiff.statistics import Statistics

WIDE_BUDGET = 2**18
WIDE, WAITING_ROWS = 1024, 512
"""Layers of this width or more wait with their rows until there are so many."""

LAGS_AS_WIDE, SHARE_OF_PIXELS = 4, 0.5
"""13 autocovariances cost what the Gram matrix of a layer about four times as wide does; half as
many pixels as tokens enter."""


class Recorder:
    """Adds what passes through the hooked layers to `statistics`.

    `weight` multiplies everything that the next denoiser call adds; a calibration loop may set it
    before each call (timestep weights). `reservoir` keeps some of the inputs.
    """

    def __init__(
        self, statistics: Statistics, *, seed: int, tokens_per_sample: int, dtype: torch.dtype
    ) -> None:
        self.statistics = statistics
        self.seed = seed
        self.tokens_per_sample = tokens_per_sample
        self.dtype = dtype
        self.weight = 1.0
        self.reservoir: Probes | None = statistics.probes
        self._counting: Counting | None = None  # which tokens are no padding; None: all
        self.padding: Padding | None = None
        self._watched: dict[str, Tensor] = {}
        self._places: dict[tuple[int, int], Tensor] = {}  # of this call
        self._waiting: dict[str, list[tuple[Tensor, float]]] = {}

    def heads_moment(self, name: str, x_bti: Tensor, heads: int) -> None:
        """Add per-head second moments of x (batch, tokens, heads * e) under `name`."""
        self._gram(name, _split_heads(self.rows(x_bti), heads))

    def keys(self, name: str, k_bti: Tensor, heads: int) -> None:
        """Add the keys' moments, plain and centred over the tokens of each sample.

        Softmax ignores what is constant over the keys of a query, so the centred moment is the one
        that counts.
        """
        rows_bti = self.rows(k_bti)
        if self._counting is None:
            centred_bti = rows_bti - k_bti.mean(1, keepdim=True, dtype=_summed_in(k_bti))
        else:
            own_bt1 = self._counting.mask_bt.unsqueeze(-1).to(k_bti.device)
            mean_b1i = (own_bt1 * k_bti.float()).sum(1, keepdim=True) / own_bt1.sum(1, keepdim=True)
            centred_bti = self.rows(k_bti - mean_b1i)
        self._gram(name, _split_heads(rows_bti, heads))
        self._gram(f"{name}_centred", _split_heads(centred_bti, heads))

    def moment(self, name: str, x_bti: Tensor) -> None:
        """Add the full second moment and the mean magnitude of x (batch, tokens, i)."""
        x_ni = self.rows(x_bti).flatten(0, 1)
        self._gram(name, x_ni)
        magnitude_i = torch.linalg.vector_norm(x_ni, 1, 0, dtype=_summed_in(x_ni))
        self._add(f"{name}_magnitude", magnitude_i, x_ni.shape[0])

    def output(self, name: str, y: Tensor) -> None:
        """Add what a layer puts out, y (batch, tokens, o) or (batch, o, height, width).

        All tokens but padding, or all pixels, enter, so that the mean of each channel is known.
        """
        if self._counting is not None and self._counting.fits(y):
            y = self._counting.pick(y)
        channels = 1 if y.ndim == 4 else y.ndim - 1
        others = [axis for axis in range(y.ndim) if axis != channels]
        self._add(name, y.sum(others, dtype=_summed_in(y)), y.numel() // y.shape[channels])

    def influence(self, name: str, x_bti: Tensor, y_bti: Tensor) -> None:
        """Add 1 - cos(x, y) over tokens: how much a block turns its input (block influence).

        A block that changes the number of channels counts as turning all of it: 1.
        """
        if x_bti.ndim == 4 and y_bti.ndim == 4:
            x_bti, y_bti = x_bti.flatten(2).mT, y_bti.flatten(2).mT
        if x_bti.ndim == y_bti.ndim == 3:
            x_bti, y_bti = self.rows(x_bti), self.rows(y_bti)
        count = y_bti[..., 0].numel()
        if x_bti.shape != y_bti.shape:
            self._add(name, y_bti.new_full((1,), count), count)
            return
        cosine_bt = torch.cosine_similarity(x_bti.float(), y_bti.float(), dim=-1)
        self._add(name, (1 - cosine_bt).sum().reshape(1), count)

    def rows(self, x_bti: Tensor) -> Tensor:
        """At most `tokens_per_sample` tokens of x (fewer where x is wide), the same every run.

        Where some are padding, the others of all samples are joined to one.
        A Gram matrix of width i costs i^2 a row; beyond 1024 channels rows are thinned so that it
        stays below the cost of the layer that it describes.
        """
        kept = self._kept(x_bti.shape[2])
        if self._counting is not None:
            kept *= len(x_bti)
            x_bti = self._counting.pick(x_bti)
        tokens = x_bti.shape[1]
        if tokens <= kept:
            return x_bti
        return x_bti.index_select(1, self._subset(tokens, kept, x_bti.device))

    def lags(self, name: str, x_bcyx: Tensor) -> None:
        """Add the autocovariances of a feature map x (batch, c, height, width) under `name`.

        Whole images enter, since autocovariances of a subset of the pixels need not be those of
        any image; but only so many that about half as many pixels do as `rows` would take tokens.
        The first call always adds one. Products of one call are float32 (float64 of float64).
        """
        batch, channels, height, width = x_bcyx.shape
        pixels = SHARE_OF_PIXELS * self._kept(LAGS_AS_WIDE * channels)
        share = min(1.0, pixels / (height * width))
        count = int(share * batch + self._chance("images").random())
        if not self.statistics.weights.get(name):
            count = max(count, 1)
        if not count:
            return
        if count < batch:
            x_bcyx = x_bcyx.index_select(0, self._subset(batch, count, x_bcyx.device))
        self._add(name, autocovariances(x_bcyx, _summed_in(x_bcyx)), count * height * width)

    @contextlib.contextmanager
    def only(self, counting: Counting | None) -> Iterator[None]:
        """Have only these tokens count of what is added inside; None: as they count in all."""
        before = self._counting
        self._counting = before if counting is None else counting
        try:
            yield
        finally:
            self._counting = before

    def begin_call(self, arguments: dict[str, Any]) -> None:
        """Offer the inputs of a denoiser call to the probes, and look for padding among them."""
        self._counting = None if self.padding is None else self.padding.begin(arguments)
        if self.reservoir is not None:
            self.reservoir.offer(arguments)

    def end_call(self) -> None:
        """Count the call and refuse what was not finite in it.

        Raises:
            SlimdiffError: an activation was NaN or infinite; names the module.
        """
        self.statistics.calls += 1
        self._places.clear()
        watched = self._watched
        if not watched:
            return
        largest = torch.stack(torch._foreach_norm(list(watched.values()), math.inf))
        if not largest.isfinite().all():
            bad = next(n for n, own in watched.items() if not own.isfinite().all())
            raise SlimdiffError(
                f"{bad}: activation is NaN or infinite in denoiser call "
                f"{self.statistics.calls}; run in float32 or bfloat16, or check the weights"
            )

    def _kept(self, width: int) -> int:
        return min(self.tokens_per_sample, max(32, WIDE_BUDGET // width))

    def _subset(self, among: int, count: int, device: torch.device) -> Tensor:
        """So many places of so many, ascending; the same for all layers of a call.

        Drawn on the CPU, so that every device gets the same, and moved once a call.
        """
        if (among, count) not in self._places:
            chosen = self._chance(f"{among}/{count}").sample(range(among), count)
            self._places[among, count] = torch.tensor(sorted(chosen), device=device)
        return self._places[among, count]

    def _chance(self, name: str) -> random.Random:
        """Chance that is the same in every run, of its own for each name in each call."""
        return random.Random(f"{self.seed}/{self.statistics.calls}/{name}")

    def flush(self) -> None:
        """Add what waits; the statistics are complete after it."""
        for name in list(self._waiting):
            self._add_waiting(name)

    def _gram(self, name: str, x_ne: Tensor) -> None:
        """Add a Gram matrix; rows of a wide layer wait until there are enough.

        Reading and writing a sum of 5120 by 5120 costs more than the products of few rows.
        """
        if x_ne.numel() == 0:
            raise SlimdiffError(f"{name}: the activation has zero tokens; expected at least one")
        if x_ne.ndim > 2 or x_ne.shape[-1] < WIDE:
            self.statistics.add_gram(name, x_ne, self.weight, self.dtype)
            if name not in self._watched:
                self._watched[name] = self.statistics.sums[name].diagonal(dim1=-2, dim2=-1)
            return
        waiting = self._waiting.setdefault(name, [])
        waiting.append((x_ne.detach().clone(), self.weight))
        if sum(len(x) for x, _ in waiting) >= WAITING_ROWS:
            self._add_waiting(name)

    def _add_waiting(self, name: str) -> None:
        waiting = self._waiting.pop(name)
        for weight in dict.fromkeys(weight for _, weight in waiting):
            x_ne = torch.cat([x for x, own in waiting if own == weight])
            self.statistics.add_gram(name, x_ne, weight, self.dtype)

    def _add(self, name: str, total: Tensor, rows: int) -> None:
        if not rows:
            raise SlimdiffError(f"{name}: the activation has zero tokens; expected at least one")
        if name not in self.statistics.sums:
            self.statistics.add(name, total.new_zeros(total.shape, dtype=self.dtype), 0.0)
        self.statistics.add(name, total, self.weight * rows, self.weight)
        self._watched[name] = self.statistics.sums[name]


def _split_heads(x_bti: Tensor, heads: int) -> Tensor:
    """x (heads, n, e) of x (batch, tokens, heads * e)."""
    return x_bti.reshape(-1, heads, x_bti.shape[2] // heads).transpose(0, 1)


def _summed_in(x: Tensor) -> torch.dtype:
    """What sums and products of one call are of: float32, float64 for what is float64."""
    return torch.promote_types(x.dtype, torch.float32)
