"""Low rank in place of every attention and feed-forward matrix: W ~ A B, two linears for one.

`plain` keeps the largest singular values of each matrix. `whitened` is SVD-LLM (arXiv 2403.07378),
its truncation-aware data whitening: with S S^T = E[x x^T] the singular values of W S are the losses
of output that truncating them costs, and W S ~ U_r diag(s_r) V_r^T gives A = U_r diag(s_r)^1/2 and
B = diag(s_r)^1/2 V_r^T S^-1. Its second stage, fine-tuning by LoRA, is training and left out.

Both give every matrix the same ratio of parameters, as the paper does; a matrix whose factors would
not be smaller stays. Adapted from language models: cross-attention's keys and values are whitened
by the moment of the text states that they read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import slimdiff
from peers.job import Job, copy_of, kept_with, weight
from slimdiff.allocate import Unit, uniform
from slimdiff.config import TRANSFORMER
from slimdiff.decompose import DAMPING
from slimdiff.decompose.linalg import damped, triangular_factor
from slimdiff.evaluate import generate
from slimdiff.groups import Group

Factors = tuple[Tensor, Tensor]

INPUT_PROMPTS = 32
INPUT_BATCH = 16


def plain(job: Job) -> nn.Module:
    """Plain singular value decomposition."""
    return _replaced(job, lambda path, w_oi, rank: plain_factors(w_oi, rank))


def whitened(job: Job) -> nn.Module:
    """SVD-LLM: whitened by the second moment of each matrix's input."""
    inputs = kept_with(job.pipe.unet, "input moments", lambda: input_moments(job))
    return _replaced(job, lambda path, w_oi, rank: whitened_factors(w_oi, inputs[path], rank))


def plain_factors(w_oi: Tensor, rank: int) -> Factors:
    """A (o, r) and B (r, i) that minimise |W - A B|^2."""
    u_ok, s_k, vt_ki = torch.linalg.svd(w_oi, full_matrices=False)
    root_r = s_k[:rank].sqrt()
    return u_ok[:, :rank] * root_r, root_r[:, None] * vt_ki[:rank]


def whitened_factors(w_oi: Tensor, c_ii: Tensor, rank: int) -> Factors:
    """A (o, r) and B (r, i) that minimise E|W x - A B x|^2 with E[x x^T] = `c_ii`."""
    l_ii = triangular_factor(damped(c_ii, DAMPING))
    a_or, b_ri = plain_factors(w_oi @ l_ii, rank)
    return a_or, torch.linalg.solve_triangular(l_ii, b_ri, upper=False, left=False)


def input_moments(job: Job) -> dict[str, Tensor]:
    """E[x x^T] of the input x of every matrix, by the path of its linear.

    Those of output and down projections are in the statistics; the others are recorded here, in
    float64, over a few of the same prompts.
    """
    groups = slimdiff.groups_of(job.pipe.unet, TRANSFORMER)
    prompts = job.prompts[:INPUT_PROMPTS]
    with _recorded_inputs(job.pipe.unet, groups) as sums:
        generate(
            job.pipe,
            prompts,
            range(len(prompts)),
            batch_size=INPUT_BATCH,
            output_type="latent",
            **job.sampling,
        )
    known = {"out": "z", "down": "h"}
    return {path: total / count for path, (total, count) in sums.items()} | {
        group.paths[role]: job.statistics.mean(f"{group.layer}/{what}")
        for group in groups
        for role, what in known.items()
        if role in group.paths
    }


@contextlib.contextmanager
def _recorded_inputs(
    unet: nn.Module, groups: list[Group]
) -> Iterator[dict[str, tuple[Tensor, int]]]:
    sums: dict[str, tuple[Tensor, int]] = {}

    def hook_for(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_ni = args[0].detach().flatten(0, -2).double()
            total, count = sums.get(path, (0.0, 0))
            sums[path] = (total + x_ni.mT @ x_ni, count + len(x_ni))

        return hook

    roles = {"q", "k", "v", "up"}
    paths = [path for g in groups for role, path in g.paths.items() if role in roles]
    handles = [unet.get_submodule(p).register_forward_pre_hook(hook_for(p)) for p in paths]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _replaced(job: Job, factors: Callable[[str, Tensor, int], Factors]) -> nn.Module:
    unet = copy_of(job)
    for path, rank in _ranks(job).items():
        linear = unet.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        unet.set_submodule(path, two_linears(linear, *factors(path, weight(unet, path), rank)))
    return unet


def _ranks(job: Job) -> dict[str, int]:
    """Rank of every matrix that is replaced, at one ratio of parameters."""
    units = []
    for group in slimdiff.groups_of(job.pipe.unet, TRANSFORMER):
        for path in group.paths.values():
            o, i = weight(job.pipe.unet, path).shape
            counts = [*range(o + i, o * i, o + i), o * i]
            units.append(Unit(path, counts, counts))
    choice = uniform(units, sum(unit.costs[-1] for unit in units) - job.remove)
    return {
        unit.name: index + 1
        for unit, index in zip(units, choice, strict=True)
        if index + 1 < len(unit.sizes)
    }


def two_linears(linear: nn.Linear, a_or: Tensor, b_ri: Tensor) -> nn.Sequential:
    """B, then A with the bias of `linear`, in its dtype and on its device."""
    like = linear.weight
    first = nn.Linear(b_ri.shape[1], b_ri.shape[0], bias=False)
    second = nn.Linear(a_or.shape[1], a_or.shape[0], bias=linear.bias is not None)
    first.weight = nn.Parameter(b_ri.to(like).contiguous())
    second.weight = nn.Parameter(a_or.to(like).contiguous())
    if linear.bias is not None:
        second.bias = nn.Parameter(linear.bias.detach().clone())
    return nn.Sequential(first, second)
