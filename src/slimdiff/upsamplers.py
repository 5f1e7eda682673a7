"""Upsamplers that are fused: the map is convolved before it is doubled, which changes no output.

Nearest-neighbour doubling repeats every pixel four times, so three quarters of the multiplications
of the 3 by 3 convolution behind it are made again (`slim_denoiser.FusedUpsample2D`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from slimdiff.groups import Group
from slimdiff.layers import is_fused


def fusable(denoiser: nn.Module, groups: Sequence[Group]) -> tuple[str, ...]:
    """Module paths of the upsamplers before these groups that can be fused, and are not yet."""
    from slimdiff.slim_denoiser import may_be_fused

    return tuple(
        group.upsampler
        for group in groups
        if group.upsampler
        and not is_fused(denoiser, group)
        and may_be_fused(denoiser.get_submodule(group.upsampler))
    )


def fused_for(denoiser: nn.Module, groups: Sequence[Group], metric: str) -> tuple[str, ...]:
    """The upsamplers to fuse under a budget: all under MACs; a time has to be measured first.

    Parameters are the same either way, so under a budget of those such layers stay as they are.
    """
    return fusable(denoiser, groups) if metric == "macs" else ()
