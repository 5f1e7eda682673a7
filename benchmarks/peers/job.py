"""What every peer gets and gives: a job, a peer, and what the structural ones share."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

import slimdiff
from slimdiff import costs
from slimdiff.allocate import Unit, allowed_sizes, uniform
from slimdiff.config import TRANSFORMER
from slimdiff.denoiser import settings
from slimdiff.groups import LAYERS, Group
from slimdiff.plan import Entry, Plan, SlimRecord
from slimdiff.planning import counted
from slimdiff.shapes import slim_config
from slimdiff.slim_denoiser import become_slim_
from slimdiff.upsamplers import fusable

MULTIPLE = 4
"""Uniform widths are multiples of this: 8, as slimdiff's own, would round heads of 40 channels so
coarsely that it doubles the error of pruning them; 1 leaves widths that vector units dislike."""


@dataclass(frozen=True)
class Job:
    """A dense pipeline, what was recorded from it, and how much must go.

    Attributes:
        pipe: dense diffusers pipeline; read only.
        statistics: recorded from it.
        log_statistics: the same with log-decreasing timestep weights.
        prompts: calibration prompts.
        sampling: `num_inference_steps` and `guidance_scale`.
        remove: parameters of the denoiser that must go, at least.
        layers: what may shrink, for the peers that know more than attention and feed-forward.
    """

    pipe: Any
    statistics: slimdiff.Statistics
    log_statistics: slimdiff.Statistics | None
    prompts: list[str]
    sampling: dict[str, Any]
    remove: int
    layers: tuple[str, ...] = TRANSFORMER


@dataclass(frozen=True)
class Peer:
    """A row of the benchmark.

    Attributes:
        name: its label.
        origin: the package, or "ours, after <paper>".
        slim: makes a new denoiser that takes the place of `pipe.unet`.
        structural: whether it removes parameters; others ignore `remove`.
    """

    name: str
    origin: str
    slim: Callable[[Job], nn.Module]
    structural: bool = True


def uniform_sizes(job: Job, *, heads: bool = False) -> dict[str, int]:
    """The same share of every attention and feed-forward layer, as near as whole sizes allow.

    Args:
        job: names the denoiser and what must go.
        heads: sizes of attention layers are whole heads instead of channels per head.

    Returns:
        Layer path -> channels per head or heads, and hidden units.

    Raises:
        SlimdiffError: the smallest sizes leave too much.
    """
    layers = layers_of(slimdiff.groups_of(job.pipe.unet, job.layers))
    per_channel = _costs(job.pipe.unet).groups
    units = []
    for path, groups in layers.items():
        by_heads = heads and LAYERS[groups[0].kind] == "attention"
        width, count = groups[0].width, groups[0].heads
        dense, step = (count, width) if by_heads else (width, count)
        price = step * sum(per_channel[group.name].params for group in groups)
        sizes = allowed_sizes(dense, 1 if by_heads else MULTIPLE, groups[0].step)
        units.append(Unit(path, sizes, [price * size for size in sizes]))
    choice = uniform(units, sum(unit.costs[-1] for unit in units) - job.remove)
    return {unit.name: unit.sizes[index] for unit, index in zip(units, choice, strict=True)}


def entries_of(
    groups: Sequence[Group], sizes: Mapping[str, int], *, heads: bool = False
) -> dict[str, Entry]:
    """What becomes of each group under the sizes of its layer."""
    entries = {}
    for group in groups:
        by_heads = heads and LAYERS[group.kind] == "attention"
        size = sizes[group.layer]
        kept = (group.width, size) if by_heads else (size, group.heads)
        entries[group.name] = Entry(group.kind, kept[0], group.width, kept[1], group.heads)
    return entries


def layers_of(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Groups by the layer that they belong to."""
    layers: dict[str, list[Group]] = {}
    for group in groups:
        layers.setdefault(group.layer, []).append(group)
    return layers


def become_slim(unet: nn.Module, dense: nn.Module, plan: Plan) -> nn.Module:
    """Let a copy of `dense` with narrow linears know its widths; it can be saved like any slim one.

    Every attention attribute that follows from a width (heads, inner width, scale) is set here.
    """
    groups = slimdiff.groups_of(dense)
    plan.check(groups)
    plan.figures.update(counted(groups, _costs(dense), plan.entries, plan.fused))
    become_slim_(unet, slim_config(unet, groups, plan.entries))
    unet.slim_record = SlimRecord(plan, {})  # type: ignore[assignment]  # no tensor
    return unet


def fuse_upsamplers_(unet: nn.Module) -> None:
    """Fuse the upsamplers of a slim UNet, in place."""
    paths = fusable(unet, slimdiff.groups_of(unet))
    become_slim_(unet, settings(unet)["slimdiff"] | {"fused_upsamplers": dict.fromkeys(paths, 2)})


def removable(unet: nn.Module, layers: Sequence[str] = TRANSFORMER) -> int:
    """Parameters of these layers, attention and feed-forward, that depend on a width."""
    per_channel = _costs(unet).groups
    groups = slimdiff.groups_of(unet, layers)
    return sum(per_channel[g.name].of("params", g.width * g.heads) for g in groups)


def copy_of(job: Job) -> nn.Module:
    """A dense denoiser of the peer's own."""
    return copy.deepcopy(job.pipe.unet)


def weight(unet: nn.Module, path: str) -> Tensor:
    """A linear's weight in float64."""
    return unet.get_submodule(path).weight.detach().double()  # type: ignore[operator]  # a linear


class _Kept(dict[Any, tuple[Any, float]]):
    """What was made from one denoiser, the seconds that it took, and those that reuse spared."""

    spared = 0.0


_KEPT: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def kept_with(denoiser: nn.Module, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` returned the first time for this denoiser and key."""
    kept = _KEPT.setdefault(denoiser, _Kept())
    if key in kept:
        kept.spared += kept[key][1]
    else:
        start = time.perf_counter()
        kept[key] = (make(), time.perf_counter() - start)
    return kept[key][0]


def seconds_spared(denoiser: nn.Module) -> float:
    """Seconds that peers would have spent on this denoiser so far, had nothing been kept."""
    return _KEPT.setdefault(denoiser, _Kept()).spared


def _costs(unet: nn.Module) -> costs.Costs:
    def measured() -> costs.Costs:
        return costs.measure(unet, slimdiff.groups_of(unet), costs.example_inputs(unet))

    return kept_with(unet, "costs", measured)
