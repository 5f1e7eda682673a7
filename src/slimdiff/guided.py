"""Guided predictions: what the halves of classifier-free guidance make of an error together.

A guided pipeline draws with u + g (c - u), u the prediction without and c that with the prompt. So
an error of c weighs g, one of u weighs 1 - g, and errors that both share weigh 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimdiff.probes import Probe, Probes

T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; beyond them 2."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What the rows of some calls are put together to: one prediction for each point or row.

    Attributes:
        matrix_sr: (predictions, rows) float64; prediction = matrix times the rows.
        prompts: of each prediction, a hash.
    """

    matrix_sr: Tensor
    prompts: tuple[str, ...]

    @classmethod
    def of(cls, probes: Probes, size: int, *, guided: bool) -> Predictions:
        """The guided predictions of the probes in calls of `size` rows; else every row by itself.

        Args:
            probes: pairs of rows of a point become one prediction, if the scale is known.
            size: most rows of a call.
            guided: whether to put pairs together.
        """
        rows = [probe for call in probes.calls(size) for probe in call]
        of, empty = probes.prompts(), probes.unguided_prompt()
        scale = probes.guidance if guided else None
        points: dict[str, list[int]] = {}
        for place, probe in enumerate(rows):
            points.setdefault(probe.point, []).append(place)
        found: list[tuple[str, dict[int, float]]] = []
        for point, places in points.items():
            weights = _weights([rows[place] for place in places], empty, scale)
            if weights is None:
                found += [(of[point], {place: 1.0}) for place in places]
            else:
                found.append((of[point], dict(zip(places, weights, strict=True))))
        matrix = torch.zeros(len(found), len(rows), dtype=torch.float64)
        for s, (_, own) in enumerate(found):
            for place, weight in own.items():
                matrix[s, place] = weight
        return cls(matrix, tuple(prompt for prompt, _ in found))

    def energy(self, calls: Sequence[Tensor]) -> Tensor:
        """Squared norm (predictions,) float64 of each prediction.

        Args:
            calls: for each call a tensor with a row for each of its probes.
        """
        alike: dict[tuple[int, ...], tuple[list[int], list[Tensor]]] = {}
        start = 0
        for rows in calls:
            places, parts = alike.setdefault(tuple(rows.shape[1:]), ([], []))
            places += range(start, start + len(rows))
            parts.append(rows.flatten(1).double())
            start += len(rows)
        device = calls[0].device
        total = torch.zeros(len(self.matrix_sr), dtype=torch.float64, device=device)
        for places, parts in alike.values():
            total += (self.matrix_sr[:, places].to(device) @ torch.cat(parts)).square().sum(1)
        return total


def _weights(
    rows: Sequence[Probe], empty: str | None, scale: float | None
) -> tuple[float, float] | None:
    """1 - g and g of the rows without and with the prompt; None if they are no such pair."""
    if scale is None or len(rows) != 2:
        return None
    without = [probe.prompt == empty for probe in rows]
    if sum(without) != 1:
        return None
    return (1 - scale, scale) if without[0] else (scale, 1 - scale)


def interval(
    squared_s: Tensor, energy_s: Tensor, prompts: Sequence[str]
) -> tuple[float, float] | None:
    """95 % interval of the ratio of two sums, where predictions of one prompt depend on each other.

    The ratio estimator's variance over prompts, and Student's t; on the logarithm, since errors are
    positive and skewed (Cochran, Sampling Techniques, 1977, chapter 6). None for a single prompt.
    """
    texts = {text: place for place, text in enumerate(dict.fromkeys(prompts))}
    if len(texts) < 2:
        return None
    index = torch.tensor([texts[text] for text in prompts], device=squared_s.device)
    sums = [x.new_zeros(len(texts)).index_add_(0, index, x) for x in (squared_s, energy_s)]
    ratio = float(sums[0].sum() / sums[1].sum())
    if ratio <= 0:
        return (0.0, 0.0)
    residual = (sums[0] - ratio * sums[1]).square().sum() * len(texts) / (len(texts) - 1)
    deviation = float(residual.sqrt() / sums[1].sum()) / ratio
    freedom = len(texts) - 1
    quantile = T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else 2.0
    width = math.exp(min(quantile * deviation, 50.0))
    return ratio / width, ratio * width
