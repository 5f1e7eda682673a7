"""What every decomposition offers: an error for each width, and the maps of one."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A group's error curve and, on request, the maps of one width.

    Attributes:
        errors: (width + 1,) float64; `errors[w]` is the predicted mean squared error of the
            group's output (of its logits for query-key) at width w. The last is exactly zero.
        missing: directions that calibration never excited, of the worst head where heads are
            separate. They cost nothing by this measure, so a caller should warn about them.
    """

    errors: Tensor
    missing: int

    @property
    def width(self) -> int:
        """The dense width: per head for attention, hidden units for feed-forward."""
        return self.errors.shape[0] - 1

    @property
    def singular(self) -> bool:
        """Whether calibration left some direction of the group without data."""
        return self.missing > 0

    def maps(self, width: int) -> dict[str, Tensor]:
        """The small matrices that take dense weights to weights of `width`.

        At full width they are exact identities: nothing is rotated.

        Raises:
            ValueError: `width` is not within 0 .. the dense width.
        """
        if not 0 <= width <= self.width:
            raise ValueError(f"width must be within 0 .. {self.width}, got {width}")
        return self._identity() if width == self.width else self._slim(width)

    def _identity(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def _slim(self, width: int) -> dict[str, Tensor]:
        raise NotImplementedError
