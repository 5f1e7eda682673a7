"""Importances: how large the activations of heads, units and channels are, for pruning by them."""

from __future__ import annotations

from torch import Tensor

from slimdiff.groups import Group
from slimdiff.statistics import Statistics


def importances(group: Group, statistics: Statistics) -> Tensor:
    """Mean |activation| of every head or hidden unit, relative to the layer's largest.

    Shape (heads,) for attention, (units,) for feed-forward, (norm groups,) for a ResNet; float64.
    """
    if group.kind == "resnet":
        energy_c = statistics.mean(f"{group.layer}/lags")[0].diagonal()
        magnitude = energy_c.view(-1, group.step).mean(1).sqrt()
    elif group.kind == "modulation":
        magnitude = statistics.mean(f"{group.source or group.layer}/x_magnitude")
    elif group.kind == "projection":
        magnitude = statistics.mean(f"{group.layer}/y_magnitude")
    elif group.kind == "feed_forward":
        magnitude = statistics.mean(f"{group.layer}/h_magnitude")
    else:
        magnitude = head_magnitudes(group, statistics)
    return magnitude / magnitude.max().clamp_min(1e-300)


def head_magnitudes(group: Group, statistics: Statistics) -> Tensor:
    """Mean |activation| of every head, (heads,)."""
    channels = statistics.mean(f"{group.layer}/z_magnitude")
    return channels.unflatten(0, (group.heads, group.width)).mean(1)
