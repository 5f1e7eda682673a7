"""The recorder: adds what passes through a denoiser's layers up into statistics.

No activation is kept: each call adds one Gram matrix per statistic to a sum and forgets its inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slimdiff.decompose import LAGS, add_autocovariances
from slimdiff.errors import SlimdiffError
from slimdiff.padding import Counting, Padding
from slimdiff.probes import Probes
from slimdiff.statistics import Statistics

WIDE_BUDGET = 2**18
WIDE, WAITING_ROWS = 1024, 512
"""Layers of this width or more wait with their rows until there are so many."""

LAGS_AS_WIDE = 4
"""13 autocovariances cost what the Gram matrix of a layer about four times as wide does."""


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
        self._suspects: dict[str, Tensor] = {}
        self._waiting: dict[str, list[tuple[Tensor, float]]] = {}

    def heads_moment(self, name: str, x_bti: Tensor, heads: int) -> None:
        """Add per-head second moments of x (batch, tokens, heads * e) under `name`."""
        x_bhte = _split_heads(self.rows(name, x_bti), heads)
        self._gram(name, x_bhte.transpose(0, 1).flatten(1, 2))

    def keys(self, name: str, k_bti: Tensor, heads: int) -> None:
        """Add the keys' moments, plain and centred over the tokens of each sample.

        Softmax ignores what is constant over the keys of a query, so the centred moment is the one
        that counts.
        """
        if self._counting is None:
            mean_b1i = k_bti.float().mean(1, keepdim=True)
        else:
            own_bt1 = self._counting.mask_bt.unsqueeze(-1).to(k_bti.device)
            mean_b1i = (own_bt1 * k_bti.float()).sum(1, keepdim=True) / own_bt1.sum(1, keepdim=True)
        centred_bti = k_bti - mean_b1i.to(k_bti.dtype)
        self.heads_moment(name, k_bti, heads)
        self.heads_moment(f"{name}_centred", centred_bti, heads)

    def moment(self, name: str, x_bti: Tensor) -> None:
        """Add the full second moment and the mean magnitude of x (batch, tokens, i)."""
        x_ni = self.rows(name, x_bti).flatten(0, 1)
        self._gram(name, x_ni)
        self._add(f"{name}_magnitude", x_ni.abs().sum(0, dtype=torch.float32), x_ni.shape[0])

    def output(self, name: str, y: Tensor) -> None:
        """Add what a layer puts out, y (batch, tokens, o) or (batch, o, height, width).

        All tokens but padding, or all pixels, enter, so that the mean of each channel is known.
        """
        if self._counting is not None and self._counting.fits(y):
            y = self._counting.pick(y)
        channels = 1 if y.ndim == 4 else y.ndim - 1
        others = [axis for axis in range(y.ndim) if axis != channels]
        self._add(name, y.sum(others, dtype=self.dtype), y.numel() // y.shape[channels])

    def influence(self, name: str, x_bti: Tensor, y_bti: Tensor) -> None:
        """Add 1 - cos(x, y) over tokens: how much a block turns its input (block influence).

        A block that changes the number of channels counts as turning all of it: 1.
        """
        if x_bti.ndim == 4 and y_bti.ndim == 4:
            x_bti, y_bti = x_bti.flatten(2).mT, y_bti.flatten(2).mT
        if x_bti.shape != y_bti.shape:
            self._add(name, y_bti.new_full((1,), y_bti[..., 0].numel()), y_bti[..., 0].numel())
            return
        cosine_n = torch.cosine_similarity(x_bti.float(), y_bti.float(), dim=-1).flatten()
        if self._counting is not None:
            cosine_n = cosine_n[self._counting.index_n.to(cosine_n.device)]
        self._add(name, (1 - cosine_n).sum().reshape(1), cosine_n.numel())

    def rows(self, name: str, x_bti: Tensor) -> Tensor:
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
        order = torch.randperm(tokens, generator=self._chance(name))
        return x_bti.index_select(1, order[:kept].sort().values.to(x_bti.device))

    def lags(self, name: str, x_bcyx: Tensor) -> None:
        """Add the autocovariances of a feature map x (batch, c, height, width) under `name`.

        Whole images enter, since autocovariances of a subset of the pixels need not be those of
        any image; but only so many that about as many pixels do as `rows` would take of each. The
        first call always adds one. Products of one image are float32.
        """
        self._watch(name, x_bcyx)
        batch, channels, height, width = x_bcyx.shape
        first = name not in self.statistics.sums
        chance = self._chance(name)
        share = min(1.0, self._kept(LAGS_AS_WIDE * channels) / (height * width))
        count = int(share * batch + float(torch.rand((), generator=chance)))
        if first:
            shape = (len(LAGS), channels, channels)
            self.statistics.add(name, x_bcyx.new_zeros(shape, dtype=self.dtype), 0.0)
        chosen = torch.randperm(batch, generator=chance)[: max(count, int(first))].tolist()
        for row in chosen:
            add_autocovariances(
                x_bcyx[row : row + 1],
                lambda lag, a, b: self.statistics.add_product(name, lag, a, b, self.weight),
                torch.float32,
            )
        self.statistics.weights[name] += self.weight * len(chosen) * height * width

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
        suspects, self._suspects = self._suspects, {}
        if suspects and not torch.stack(list(suspects.values())).isfinite().all():
            bad = next(name for name, value in suspects.items() if not value.isfinite())
            raise SlimdiffError(
                f"{bad}: activation is NaN or infinite in denoiser call "
                f"{self.statistics.calls}; run in float32 or bfloat16, or check the weights"
            )

    def _kept(self, width: int) -> int:
        return min(self.tokens_per_sample, max(32, WIDE_BUDGET // width))

    def _chance(self, name: str) -> torch.Generator:
        """Chance that is the same in every run, for one statistic in one call."""
        text = f"{self.seed}/{self.statistics.calls}/{name.removesuffix('_centred')}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(seed)

    def flush(self) -> None:
        """Add what waits; the statistics are complete after it."""
        for name in list(self._waiting):
            self._add_waiting(name)

    def _gram(self, name: str, x_ne: Tensor) -> None:
        """Add a Gram matrix; rows of a wide layer wait until there are enough.

        Reading and writing a sum of 5120 by 5120 costs more than the products of few rows.
        """
        self._watch(name, x_ne)
        if x_ne.ndim > 2 or x_ne.shape[-1] < WIDE:
            self.statistics.add_gram(name, x_ne, self.weight, self.dtype)
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
        self._watch(name, total)
        self.statistics.add(name, self.weight * total.to(self.dtype), self.weight * rows)

    def _watch(self, name: str, x: Tensor) -> None:
        if x.numel() == 0:
            raise SlimdiffError(f"{name}: the activation has zero tokens; expected at least one")
        self._suspects[name] = x.sum(dtype=torch.float32)


def _split_heads(x_bti: Tensor, heads: int) -> Tensor:
    return x_bti.unflatten(-1, (heads, -1)).transpose(1, 2)
