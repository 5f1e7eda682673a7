"""MoDeGPT (arXiv 2408.09632): one decomposition for each kind of layer, widths by block influence.

- Query-key: CR decomposition. Of each head, the channels of largest |C_q^1/2[:, j]| |C_k^1/2[:, j]|
  stay (Algorithm 2), with C_q = E[q q^T] and C_k = E[k k^T].
- Value-output: SVD of C_x^1/2 Wv^T Wo^T per head (Algorithm 3), from the moment of the values.
- Feed-forward: Nystrom with ridge leverage scores (Algorithm 1).
- Widths: removed share n * mean * softmax(-influence / temperature) (eq. 10), at temperature 0.1,
  which rises while a share would pass 1.

The last three are slimdiff's recipe `paper`, with its ridge of one mean eigenvalue; query-key is
what differs. There is no rotary embedding in a UNet, so channels are chosen one by one. Adapted
from language models: cross-attention is one more layer of its block, both halves of an attention
layer share one width, and widths are multiples of 4.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import slimdiff
from peers.job import MULTIPLE, Job, become_slim, copy_of, layers_of, removable
from slimdiff.config import TRANSFORMER, recipe_named
from slimdiff.groups import Group
from slimdiff.plan import Plan
from slimdiff.recipes import decompose_group
from slimdiff.rewrite import put_, slim_weights

TEMPERATURE = 0.1


def slim(job: Job) -> nn.Module:
    """Decompose every layer to the widths of the entropic allocation."""
    unet = copy_of(job)
    groups = slimdiff.groups_of(unet, TRANSFORMER)
    plan = _plan(job)
    for group in plan.changed(groups):
        entry = plan.entries[group.name]
        maps = _maps(job, group, entry.width)
        put_(unet, group, slim_weights(unet, group, entry, maps))
    return become_slim(unet, job.pipe.unet, replace(plan, recipe="modegpt"))


def column_selection(q_moment_hee: Tensor, k_moment_hee: Tensor, width: int) -> Tensor:
    """Columns (h, e, r) of the identity that keep the channels of largest score.

    |C^1/2[:, j]|^2 is C[j, j], so no root is taken.
    """
    score_he = (
        q_moment_hee.diagonal(dim1=-2, dim2=-1) * k_moment_hee.diagonal(dim1=-2, dim2=-1)
    ).sqrt()
    kept_hr = score_he.topk(width, dim=-1).indices.sort(dim=-1).values
    eye_ee = torch.eye(score_he.shape[-1], dtype=score_he.dtype, device=score_he.device)
    return eye_ee[kept_hr].mT


def _maps(job: Job, group: Group, width: int) -> dict[str, Tensor]:
    if group.kind != "query_key":
        recipe = recipe_named("paper")
        return decompose_group(job.pipe.unet, group, job.statistics, recipe).maps(width)
    q_hee, k_hee = (job.statistics.mean(f"{group.layer}/{what}") for what in ("q", "k"))
    selection_her = column_selection(q_hee, k_hee, width)
    return {"q": selection_her, "k": selection_her}


def _plan(job: Job) -> Plan:
    return slimdiff.allocate(
        job.pipe.unet,
        job.statistics,
        slimdiff.Budget(remove=max(job.remove, 1)),
        recipe="paper",
        allocation="entropic",
        temperature=_temperature(job),
        multiple=MULTIPLE,
        curves={},
    )


def _temperature(job: Job) -> float:
    """The lowest from 0.1 upwards, by quarters, at which no layer should lose more than it has."""
    blocks = [
        groups[0].block
        for groups in layers_of(slimdiff.groups_of(job.pipe.unet, TRANSFORMER)).values()
    ]
    influence_n = torch.cat([job.statistics.mean(f"{block}/influence") for block in blocks])
    mean = min(job.remove / removable(job.pipe.unet), 0.99)
    temperature = TEMPERATURE
    while mean * len(blocks) * (-influence_n / temperature).softmax(0).max() > 1:
        temperature *= 1.25
    return temperature
