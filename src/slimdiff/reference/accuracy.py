"""What a judge says of images: shares that are right, and measures that have no right and wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from slimdiff.metrics import wilson

Interval = tuple[float, float]


@dataclass(frozen=True)
class Accuracy:
    """Shares of `n` images that are right, by attribute.

    Attributes:
        shares: attribute -> share; "whole" is every attribute at once.
        graded: measure -> its value for each image, from -1 to 1, 1 being perfect.
    """

    n: int
    shares: dict[str, float]
    graded: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def whole(self) -> float:
        """Share of images with everything right."""
        return self.shares["whole"]

    @property
    def interval(self) -> Interval:
        """Wilson's 95 % interval of `whole`."""
        return self.interval_of("whole")

    def interval_of(self, name: str) -> Interval:
        """95 % interval of a share (Wilson's) or of the mean of a measure (normal)."""
        if name in self.graded:
            return mean_interval(self.graded[name])
        return wilson(round(self.shares[name] * self.n), self.n)

    @property
    def means(self) -> dict[str, float]:
        """Mean of each measure."""
        return {name: sum(values) / self.n for name, values in self.graded.items()}

    def change_from(self, dense: Accuracy, name: str) -> tuple[float, Interval]:
        """Mean change of a measure from `dense`'s images, image by image, and its 95 % interval.

        Raises:
            ValueError: the accuracies are of different numbers of images.
        """
        pairs = list(zip(self.graded[name], dense.graded[name], strict=True))
        changes = [own - other for own, other in pairs]
        return sum(changes) / len(changes), mean_interval(changes)

    def record(self) -> dict[str, Any]:
        """As `slimdiff.results` has it; measures stand among the attributes."""
        values = {**self.shares, **self.means}
        return {
            "whole": self.whole,
            "interval": list(self.interval),
            "attributes": {
                name: {"share": value, "interval": list(self.interval_of(name))}
                for name, value in values.items()
            },
            "count": self.n,
        }

    def __str__(self) -> str:
        """One line of percentages."""
        parts = [f"{name} {100 * share:.1f} %" for name, share in self.shares.items()]
        low, high = self.interval
        parts[-1] += f" (95 %: {100 * low:.1f} to {100 * high:.1f}; n = {self.n})"
        return ", ".join([*parts, *(f"{name} {mean:.3f}" for name, mean in self.means.items())])


def mean_interval(values: Sequence[float], z: float = 1.96) -> Interval:
    """Normal interval of a mean: 95 % at the default `z`; of one value, that value."""
    n, mean = len(values), sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(n - 1, 1)
    half = z * math.sqrt(spread / n)
    return mean - half, mean + half
