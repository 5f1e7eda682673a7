"""Error curves and gains: what each group's width does to the denoiser's output.

A decomposition predicts its own error at every width. Its *gain*, how much of that error reaches
the denoiser's output, is measured with forward passes only: one weight of the group is swapped for
the dense-size weight that behaves as the slim one, and the probes are run again. The gain is not
the same at all widths: it is measured at `PROBED_SHARES` of the dense width, and between them its
logarithm is interpolated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from slimdiff import decompose
from slimdiff.config import Recipe
from slimdiff.decompose import Decomposition
from slimdiff.errors import SlimdiffError
from slimdiff.groups import LAYERS, Group
from slimdiff.layers import factor_of, factors_of, layer_at, weight_of
from slimdiff.plan import Entry
from slimdiff.probing import Probed
from slimdiff.recipes import Ordered, decompose_group
from slimdiff.removal import constant_weights, removable_layers
from slimdiff.statistics import Statistics

Progress = Callable[[str, int, int], None]

SMALLEST_SHARE = 1e-4
PROBED_SHARES = (0.5, 0.25)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ErrorCurve:
    """Predicted error of one group by width.

    Width 0 stands for a layer that puts out its mean.

    Attributes:
        errors: (dense width + 1,) float64 on the CPU; squared error of the group's own output.
        gains: width -> relative squared error of the denoiser's output per unit of `errors`;
            None where it was not measured.
        order: hidden units, ResNet channels or heads, most useful first; saves ordering them again.
        removed: relative squared error of the denoiser's output when the group's layer puts out
            its mean (0 for queries and keys, which then do not matter); None if it cannot, or was
            not measured.
        by_heads: heads that stay -> errors as above, for as few heads of an attention layer as may
            ever be worth their while; None where nobody looked. Gains are those of all heads.
    """

    errors: Tensor = field(repr=False)
    gains: Mapping[int, float] | None = None
    order: Tensor | None = field(default=None, repr=False)
    removed: float | None = None
    by_heads: Mapping[int, Tensor] | None = field(default=None, repr=False)

    @property
    def ordered(self) -> Ordered | None:
        """What spares a decomposition the search for the order of its units or channels."""
        return None if self.order is None else Ordered(self.order, self.errors)

    @property
    def gain(self) -> float | None:
        """The gain at the widest of the widths where it was measured."""
        return None if self.gains is None else self.gains[max(self.gains)]

    def at(self, width: int, heads: int | None = None) -> float:
        """Predicted relative squared error of the denoiser's output at `width`.

        Args:
            width: channels per head that stay, hidden units, channels or rank.
            heads: how many stay, if not all; one of `by_heads`.
        """
        if width == 0 and self.removed is not None:
            return self.removed
        errors = self.errors if heads is None else (self.by_heads or {})[heads]
        return float(errors[width]) * self.gain_at(width)

    def of(self, entry: Entry) -> float:
        """Predicted relative squared error of the denoiser's output under a plan's entry."""
        return self.at(entry.width, None if entry.heads == entry.dense_heads else entry.heads)

    def gain_at(self, width: int) -> float:
        """Gain, interpolated in its logarithm; beyond the measured widths that of the nearest."""
        if self.gains is None:
            return 1.0
        widths = sorted(self.gains)
        width = min(max(width, widths[0]), widths[-1])
        right = next(i for i, w in enumerate(widths) if w >= width)
        if widths[right] == width:
            return self.gains[width]
        (a, b) = widths[right - 1], widths[right]
        low, high = (max(self.gains[w], 1e-300) for w in (a, b))
        return float(low * (high / low) ** ((width - a) / (b - a)))


def error_curves(
    denoiser: nn.Module,
    groups: Sequence[Group],
    statistics: Statistics,
    recipe: Recipe,
    *,
    probed: bool = True,
    known: Mapping[str, ErrorCurve] | None = None,
    keep: Callable[[Mapping[str, ErrorCurve]], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, ErrorCurve]:
    """The error curve of every group, with its gain if `probed`.

    Recipes that remove whole heads have no curve for attention: it is left out. Curves that are
    `known` are not measured again; `keep` is called with all of them after each measurement.

    Raises:
        SlimdiffError: statistics of another model, or no probes to measure gains on.
    """
    if not statistics.calls:
        raise SlimdiffError(
            "the statistics are empty: run the denoiser inside slimdiff.record(), or calibrate "
            "with at least one prompt"
        )
    curves: dict[str, ErrorCurve] = dict(known or {})
    singular: list[str] = []
    curved = [group for group in groups if not (recipe.heads and LAYERS[group.kind] == "attention")]
    missing = [group for group in curved if group.name not in curves]
    probes = probes_of(denoiser, statistics, held_out=False) if probed and missing else None
    may_go = removable_layers(denoiser, curved, statistics)
    for done, group in enumerate(missing, start=1 + len(curved) - len(missing)):
        decomposition = decompose_group(denoiser, group, statistics, recipe)
        assert isinstance(decomposition, Decomposition)
        if decomposition.singular:
            singular.append(group.name)
        gains = None if probes is None else _gains(probes, group, decomposition)
        order = getattr(decomposition, "order_f", getattr(decomposition, "order_c", None))
        removed = None
        if probes is not None and group.layer in may_go:
            constant = constant_weights(denoiser, group, statistics)
            removed = probes.error(constant) if constant else 0.0
        curves[group.name] = ErrorCurve(decomposition.errors.cpu(), gains, order, removed)
        del decomposition  # before the next one takes its memory
        if keep is not None:
            keep(curves)
        if progress is not None:
            progress("probe" if probed else "decompose", done, len(curved))
    _warn_of_singular(singular, len(curved))
    return curves


def probes_of(denoiser: nn.Module, statistics: Statistics, *, held_out: bool = True) -> Probed:
    """The denoiser as it stands, with half of the statistics' probes to measure changes on.

    Gains are measured on one half, and what was chosen by them is judged on the other: on its own
    half the chosen plan looks better than it is (on scenes-unet by a third at 60 % removed).

    Raises:
        SlimdiffError: the statistics hold no probes.
    """
    return Probed(denoiser, statistics.probes.halves()[held_out])


def _gains(probes: Probed, group: Group, decomposition: Decomposition) -> dict[int, float]:
    """Measured error of the output over the predicted one, at some widths.

    Where a width is predicted to lose (almost) nothing, narrower ones are measured.
    """
    errors = decomposition.errors
    floor = SMALLEST_SHARE * float(errors[0])
    gains: dict[int, float] = {}
    for share in PROBED_SHARES:
        width = _multiple(group, int(share * (group.largest or group.width)))
        while width > group.step and float(errors[width]) <= floor:
            width = _multiple(group, width // 2)
        predicted = float(errors[width])
        if width in gains or predicted <= 0:
            continue
        weights = effective_weights(probes.denoiser, group, decomposition.maps(width))
        gains[width] = probes.error(weights) / max(predicted, floor)
    return gains or {group.width: 0.0}


def _multiple(group: Group, width: int) -> int:
    return max(1, width // group.step) * group.step


def effective_weights(
    denoiser: nn.Module, group: Group, maps: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Parameters that make the group behave as the slim one with nothing reshaped, by name.

    They have the size of those that they stand for, but for factors of a rank of their own.
    """
    if (projection := factor_of(denoiser, group)) is not None:
        given = (maps[name].to(projection.dtype) for name in ("weight", "projection"))
        pair = factors_of(layer_at(denoiser, group.layer), *given)
        return {
            f"{group.layer}.{name}": factor
            for name, factor in zip(("weight", "projection"), pair, strict=True)
        }
    role, effective = {
        "query_key": ("k", decompose.effective_key),
        "value_output": ("out", decompose.effective_output),
        "feed_forward": ("down", decompose.effective_down),
        "resnet": ("conv2", decompose.effective_convolution),
        "modulation": ("linear", decompose.effective_product),
        "projection": ("linear", decompose.effective_product),
    }[group.kind]
    swapped: dict[str, Tensor] = {}
    for own in group.streams(role):
        layer, path = layer_at(denoiser, group.paths[own]), group.paths[own]
        dense = weight_of(denoiser, group, own)
        weight = layer.weight.detach().clone()
        weight[:, group.input_columns(own)] = effective(
            dense.flatten(1) if role in ("down", "linear") else dense, maps
        ).view_as(dense)
        swapped[f"{path}.weight"] = weight
        if role == "k" and layer.bias is not None:
            swapped[f"{path}.bias"] = effective(layer.bias.detach(), maps)
    return swapped


def _warn_of_singular(names: Sequence[str], of: int) -> None:
    if names:
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        logger.warning(
            "statistics of %d of %d groups are singular (fewer tokens than channels, or dead or "
            "duplicated units): %s. The weights stay finite; calibrate on more prompts to be sure",
            len(names),
            of,
            shown,
        )
