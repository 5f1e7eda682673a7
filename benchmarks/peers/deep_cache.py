"""DeepCache (arXiv 2312.00858): every few steps the whole UNet, in between its outermost layers.

The package's `DeepCacheSDHelper` does the work. It replaces `forward` of the denoiser's blocks, and
its own `disable` leaves some of the replacements behind: here they are put back exactly. It keeps
all parameters, and works on a slim denoiser as on a dense one, because widths do not concern it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch import nn

from peers.job import Job, copy_of

INTERVAL = 3
BRANCH = 0


@contextlib.contextmanager
def deepcache(pipe: Any, interval: int = INTERVAL, branch: int = BRANCH) -> Iterator[Any]:
    """Sample `pipe` with cached features inside the `with`; afterwards it is as it was.

    Args:
        pipe: a diffusers pipeline with a UNet.
        interval: the whole UNet runs at every so many steps.
        branch: the skip branch up to which layers run at the other steps, counted from outside.
    """
    before = {module: module.__dict__.get("forward") for module in pipe.unet.modules()}
    try:
        _enable(pipe.unet, pipe.scheduler, interval, branch)
        yield pipe
    finally:
        for module, forward in before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def deepcache_of(job: Job) -> nn.Module:
    """A denoiser for `job.pipe` that caches at every sampling from now on; it cannot be copied."""
    unet = copy_of(job)
    _enable(unet, job.pipe.scheduler, INTERVAL, BRANCH)
    return unet


def _enable(unet: nn.Module, scheduler: Any, interval: int, branch: int) -> None:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=scheduler))
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
