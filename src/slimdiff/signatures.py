"""Signatures of prompts: how a denoiser's layers respond to each, sketched into a short row."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.calls import bound, signature_of
from slimdiff.denoiser import denoiser_of
from slimdiff.errors import SlimdiffError
from slimdiff.evaluate import generate
from slimdiff.families import groups_of
from slimdiff.groups import FACTORED, Group, is_inward
from slimdiff.padding import Counting, Padding
from slimdiff.prompts import Selection, select

Progress = Callable[[str, int, int], None]


def select_prompts(
    pipe: Any,
    pool: Sequence[str],
    n: int,
    *,
    ridge: float = 0.1,
    steps: int = 2,
    batch_size: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[str], Selection]:
    """The `n` prompts of `pool` that together say most about `pipe`, most informative first.

    Args:
        pipe: a diffusers text-to-image pipeline; it is not changed.
        pool: prompts to choose from; a prompt that comes twice counts once.
        n: how many to choose.
        ridge: as in `slimdiff.prompts.influence`.
        steps, batch_size, seed, progress: as in `signatures`.

    Returns:
        The prompts, and their rows among the distinct prompts of the pool with their scores.

    Raises:
        SlimdiffError: `n` is not between 1 and the number of distinct prompts.
    """
    distinct = list(dict.fromkeys(pool))
    if not 1 <= n <= len(distinct):
        raise SlimdiffError(
            f"n is {n}, but the pool has {len(distinct)} distinct prompts; choose 1 to "
            f"{len(distinct)}, or give a larger pool"
        )
    rows_pk = signatures(
        pipe,
        distinct,
        features=max(512, n),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    chosen = select(rows_pk, n, ridge)
    return [distinct[row] for row in chosen.order], chosen


def signatures(
    pipe: Any,
    prompts: Sequence[str],
    *,
    features: int = 512,
    steps: int = 2,
    batch_size: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """A row for each prompt: token means of what enters the last linear of every group.

    All prompts start from the same noise and run without guidance, so that rows differ by the
    prompt alone. Each group's mean is scaled to norm 1, and its channels are added with random
    signs to random features (a count sketch, which keeps inner products on average).

    Args:
        pipe: a diffusers text-to-image pipeline; it is not changed.
        prompts: at least one.
        features: length of a row.
        steps: denoising steps of the whole trajectory.
        batch_size: prompts that run together.
        seed: of the noise and of the sketch.
        progress: called with ("signatures", prompts done, prompts in all).

    Returns:
        (prompts, features) float64 on the CPU.
    """
    denoiser = denoiser_of(pipe)[1]
    groups = groups_of(denoiser)
    rows: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        with _sketched(denoiser, groups, features, seed) as sums:
            generate(
                pipe,
                batch,
                [seed] * len(batch),
                num_inference_steps=steps,
                guidance_scale=1.0,
                batch_size=batch_size,
                output_type="latent",
            )
        rows.append(torch.stack(sums).sum(0)[-len(batch) :])
        if progress is not None:
            progress("signatures", start + len(batch), len(prompts))
    return torch.cat(rows)


@contextlib.contextmanager
def _sketched(
    denoiser: nn.Module, groups: Sequence[Group], features: int, seed: int
) -> Iterator[list[Tensor]]:
    """Yields a list that gets one (batch, features) sketch per group and call."""
    sums: list[Tensor] = []

    padding, signature = Padding(denoiser, groups), signature_of(denoiser)

    def begin(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        padding.begin(bound(signature, args, kwargs))

    def hook_for(group: Group, role: str) -> Callable[..., None]:
        name, calls = group.name, iter(range(10**9))

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(2).mT if args[0].ndim == 4 else args[0]
            mean_bi = _mean(x, padding.of(group, role, x)).cpu()
            mean_bi = mean_bi / mean_bi.norm(dim=1, keepdim=True).clamp_min(1e-12)
            sums.append(sketch(mean_bi, features, f"{seed}/{name}/{next(calls)}"))

        return hook

    handles = [*padding.handles, denoiser.register_forward_pre_hook(begin, with_kwargs=True)]
    for group in (group for group in groups if group.kind not in FACTORED):
        role = ([own for own in group.paths if not is_inward(own)] or list(group.paths))[-1]
        last = denoiser.get_submodule(group.paths[role])
        handles.append(last.register_forward_pre_hook(hook_for(group, role)))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _mean(x_bti: Tensor, counting: Counting | None) -> Tensor:
    """Mean over the tokens that count, (batch, channels) float64."""
    x_bti = x_bti.flatten(1, -2).double()
    if counting is None:
        return x_bti.mean(1)
    own_bt1 = counting.mask_bt.unsqueeze(-1).to(x_bti)
    return (own_bt1 * x_bti).sum(1) / own_bt1.sum(1)


def sketch(x_bi: Tensor, features: int, name: str) -> Tensor:
    """Count sketch of the rows of x (batch, channels) into `features`; `name` seeds it."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    width = x_bi.shape[1]
    feature_i = torch.randint(features, (width,), generator=generator)
    sign_i = torch.randint(2, (width,), generator=generator) * 2 - 1
    return x_bi.new_zeros(x_bi.shape[0], features).index_add_(1, feature_i, x_bi * sign_i)
