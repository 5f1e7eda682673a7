"""Kinds of blocks: like transformer blocks that share their widths, so that few are to be compiled.

A compiler makes a graph for every set of widths. Blocks of one class and size are sorted into a few
kinds by the shares of their widths that a first plan leaves; the widths of a kind are then chosen
once for all of its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from slimdiff.groups import LAYERS, Group
from slimdiff.plan import Plan

Shares = tuple[float, ...]
"""Of each group of a block, in their order: the share of its inner channels that stays."""


def alike(denoiser: nn.Module, groups: Sequence[Group], plan: Plan, most: int) -> dict[str, str]:
    """Layer or group name -> that of the block's kind, whose width it shares.

    Args:
        denoiser: that the groups are of, not slimmed by `plan`.
        groups: all that may shrink.
        plan: which shares of each block it would leave.
        most: kinds among blocks of one class and size.
    """
    found: dict[str, str] = {}
    for blocks in like_blocks(denoiser, groups).values():
        shares = {block: _shares(own, plan) for block, own in blocks.items()}
        for kind in _clusters(shares, most):
            for block in kind:
                for group in blocks[block]:
                    for name in (group.layer, group.name):
                        found[name] = kind[0] + name.removeprefix(block)
    return found


def like_blocks(
    denoiser: nn.Module, groups: Sequence[Group]
) -> dict[tuple, dict[str, list[Group]]]:
    """What blocks with attention have in common -> the blocks, each with its groups."""
    blocks: dict[str, list[Group]] = {}
    for group in groups:
        blocks.setdefault(group.block, []).append(group)
    found: dict[tuple, dict[str, list[Group]]] = {}
    for block, own in blocks.items():
        if any(LAYERS[group.kind] == "attention" for group in own):
            module = denoiser.get_submodule(block)
            shapes = tuple((name, *weight.shape) for name, weight in module.named_parameters())
            names = tuple(group.name.removeprefix(block) for group in own)
            found.setdefault((type(module).__name__, names, shapes), {})[block] = own
    return found


def distinct(denoiser: nn.Module, groups: Sequence[Group], plan: Plan) -> int:
    """How many sets of widths blocks with attention have under a plan, over all of the denoiser."""
    return sum(
        len({_shares(own, plan) for own in blocks.values()})
        for blocks in like_blocks(denoiser, groups).values()
    )


def _shares(groups: Sequence[Group], plan: Plan) -> Shares:
    entries = [(plan.entries.get(group.name), group) for group in groups]
    return tuple(1.0 if e is None else e.width * e.heads / group.inner for e, group in entries)


def _clusters(shares: Mapping[str, Shares], most: int) -> list[list[str]]:
    """At most so many clusters: the two whose joining adds the least spread are joined (Ward)."""
    clusters = [[block] for block in shares]
    while len(clusters) > 1:
        own = [[shares[block] for block in cluster] for cluster in clusters]
        pairs = ((a, b) for b in range(len(own)) for a in range(b))
        added, a, b = min((_added(own[a], own[b]), a, b) for a, b in pairs)
        if len(clusters) <= most and added > 0:
            break
        clusters[a] += clusters.pop(b)
    return clusters


def _added(first: Sequence[Shares], second: Sequence[Shares]) -> float:
    """The squared distances to the mean that joining two clusters adds."""
    n, m = len(first), len(second)
    return n * m / (n + m) * math.dist(_mean(first), _mean(second)) ** 2


def _mean(points: Sequence[Shares]) -> Shares:
    return tuple(sum(values) / len(points) for values in zip(*points, strict=True))
