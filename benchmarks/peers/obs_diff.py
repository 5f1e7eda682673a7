"""OBS-Diff, structured (arXiv 2510.06751): whole heads and hidden units by optimal brain surgeon.

With H = E[x x^T] of the input of the output (or down) projection W, removing a block b of its
columns costs tr(W_b [(H^-1)_bb]^-1 W_b^T) once the remaining columns have made up for it. The
cheapest block goes, W is updated, and so on. The rows of the projections before W go too. Every
layer loses the same share, whole heads permitting, and H is weighted by log-decreasing timestep
weights where the job has such statistics.

Our reading: a head's cost is the exact formula above, where the authors' code adds up column by
column within a head; hidden units go in rounds of 128, scored anew after each removal, theirs in
larger batches; the ridge on H is slimdiff's 1e-6 of the mean diagonal, theirs 1e-2 by default.
These three should favour the method. Timestep weights are slimdiff's, from 1.5 down to 0.5; theirs
go from 1.2 to 0.8 by default. A layer of few heads cannot lose any share: heads are rounded, and
the share of the feed-forward layers makes up for it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import slimdiff
from peers.job import Job, become_slim, copy_of, entries_of, uniform_sizes, weight
from slimdiff import decompose
from slimdiff.decompose.linalg import damped, inverse_of_factored_, refit_coupling
from slimdiff.decompose.linalg import triangular_factor as factor
from slimdiff.groups import Group
from slimdiff.layers import layer_at
from slimdiff.plan import Entry, Plan
from slimdiff.rewrite import put_, slim_weights


def slim(job: Job) -> nn.Module:
    """Remove heads and hidden units, the same share everywhere."""
    unet = copy_of(job)
    groups = slimdiff.groups_of(unet, job.layers)
    statistics = job.log_statistics or job.statistics
    entries = entries_of(groups, uniform_sizes(job, heads=True), heads=True)
    plan = Plan(type(unet).__name__, "obs-diff", entries, "uniform")
    changed = plan.changed(groups)
    kept = {
        group.layer: _heads(unet, group, statistics, entries[group.name])
        for group in changed
        if group.kind == "value_output"
    }
    for group in changed:
        entry = entries[group.name]
        if group.kind in ("feed_forward", "resnet"):
            select = _units if group.kind == "feed_forward" else _channels
            maps = select(unet, group, statistics, entry)
            put_(unet, group, slim_weights(unet, group, entry, maps))
            continue
        weights = slim_weights(unet, group, entry, {"heads": kept[group.layer]})
        if group.kind == "value_output":
            path, moment_ii = group.paths["out"], statistics.mean(f"{group.layer}/z")
            out_oi = compensated(weight(unet, path), moment_ii, group.heads, kept[group.layer])
            weights["out"] = (out_oi, weights["out"][1])
        put_(unet, group, weights)
    return become_slim(unet, job.pipe.unet, plan)


def _heads(unet: nn.Module, group: Group, statistics: slimdiff.Statistics, entry: Entry) -> Tensor:
    w_oi, moment_ii = weight(unet, group.paths["out"]), statistics.mean(f"{group.layer}/z")
    return surviving_heads(w_oi, moment_ii, group.heads, entry.heads)


def _units(
    unet: nn.Module, group: Group, statistics: slimdiff.Statistics, entry: Entry
) -> dict[str, Tensor]:
    w_of, moment_ff = weight(unet, group.paths["down"]), statistics.mean(f"{group.layer}/h")
    return decompose.feed_forward(w_of, moment_ff, order="elimination").maps(entry.width)


def _channels(
    unet: nn.Module, group: Group, statistics: slimdiff.Statistics, entry: Entry
) -> dict[str, Tensor]:
    """Inner channels of a ResNet, whole norm groups: single channels would do far worse."""
    kernel = layer_at(unet, group.paths["conv2"]).weight.detach()
    lags_lcc = statistics.mean(f"{group.layer}/lags")
    return decompose.resnet_channels(kernel, lags_lcc, group.width // group.step).maps(entry.width)


def surviving_heads(w_oi: Tensor, moment_ii: Tensor, heads: int, count: int) -> Tensor:
    """The `count` heads (ascending) that are left when the cheapest go one by one."""
    kept = list(range(heads))
    while len(kept) > count:
        kept_h = torch.tensor(kept, device=w_oi.device)
        slim_oi = compensated(w_oi, moment_ii, heads, kept_h)
        cost_h = head_costs(slim_oi, _columns_of(moment_ii, heads, kept_h, both=True), len(kept))
        kept.pop(int(cost_h.argmin()))
    return torch.tensor(kept, device=w_oi.device)


def head_costs(w_oi: Tensor, moment_ii: Tensor, heads: int) -> Tensor:
    """tr(W_h [(H^-1)_hh]^-1 W_h^T) for every head."""
    inverse_ii = inverse_of_factored_(factor(damped(moment_ii, decompose.DAMPING)))
    e = w_oi.shape[1] // heads
    blocks_hee = inverse_ii.view(heads, e, heads, e).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    w_heo = w_oi.view(-1, heads, e).permute(1, 2, 0)
    return (w_heo * torch.linalg.solve(blocks_hee, w_heo)).sum((1, 2))


def compensated(w_oi: Tensor, moment_ii: Tensor, heads: int, kept_h: Tensor) -> Tensor:
    """W of the kept heads after all updates: W_S + W_R H_RS H_SS^-1."""
    gone_h = torch.tensor([h for h in range(heads) if h not in kept_h.tolist()], device=w_oi.device)
    if not len(gone_h):
        return w_oi
    order_h = torch.cat([kept_h, gone_h])
    c_ii = damped(_columns_of(moment_ii, heads, order_h, both=True), decompose.DAMPING)
    kept_os, gone_ot = (_columns_of(w_oi, heads, part) for part in (kept_h, gone_h))
    return kept_os + gone_ot @ refit_coupling(c_ii, kept_os.shape[1])


def _columns_of(x: Tensor, heads: int, order_h: Tensor, both: bool = False) -> Tensor:
    """Columns (and rows, where `both`) of these heads, in this order."""
    x = x.unflatten(1, (heads, -1))[:, order_h].flatten(1)
    return x.unflatten(0, (heads, -1))[order_h].flatten(0, 1) if both else x
