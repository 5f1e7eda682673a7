"""A peer at a budget of MACs: peers are told parameters to remove, so how many is searched."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from slimdiff.errors import SlimdiffError

STEPS = 8
"""Halvings: what is removed is found to a 256th of what could be."""

Made = TypeVar("Made")


def at_macs(
    slim: Callable[[int], Made], macs_of: Callable[[Made], int], target: float, most: int
) -> Made:
    """What a peer makes when it removes as little as leaves at most `target` MACs, by bisection.

    Args:
        slim: makes a denoiser without at least so many parameters.
        macs_of: MACs of what was made.
        target: MACs that may stay.
        most: parameters that could go.

    Raises:
        SlimdiffError: what the peer can remove leaves too many MACs.
    """
    enough: Made | None = None
    low, high, refusal = 0.0, 1.0, ""
    for _ in range(STEPS):
        share = (low + high) / 2
        try:
            made = slim(int(share * most))
        except SlimdiffError as error:
            high, refusal = share, f" ({error})"
            continue
        if macs_of(made) <= target:
            high, enough = share, made
        else:
            low = share
    if enough is None:
        raise SlimdiffError(f"no removal leaves at most {target / 1e6:.0f} M MACs{refusal}")
    return enough
