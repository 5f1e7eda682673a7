"""What output linears of a slim denoiser get, and what they lack of the dense ones' outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 64
"""Tokens of a sample that count, about."""


def residuals(
    dense: nn.Module, slim: nn.Module, paths: Sequence[str], sample: Callable[[], Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Moments (i, i) of inputs x, and (i, o) of x with dense - slim output, by path, float64.

    Args:
        dense, slim: the slim one runs on every input that the dense one gets.
        paths: of linears that both have, with equal outputs.
        sample: runs the dense denoiser.
    """
    seen: dict[str, Tensor] = {}
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Tensor) -> None:
            seen[path] = _thinned(out)

        return hook

    def add(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, out: Tensor) -> None:
            x_ni, lack_no = _thinned(args[0]), seen[path] - _thinned(out)
            added = (x_ni.mT @ x_ni, x_ni.mT @ lack_no)
            if path in sums:
                added = (sums[path][0] + added[0], sums[path][1] + added[1])
            sums[path] = added

        return hook

    def both(_module: nn.Module, args: Any, kwargs: Any, _out: Any) -> None:
        with torch.inference_mode():
            slim(*args, **kwargs)

    hooks = [dense.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    hooks += [slim.get_submodule(path).register_forward_hook(add(path)) for path in paths]
    hooks.append(dense.register_forward_hook(both, with_kwargs=True))
    try:
        sample()
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _thinned(x: Tensor) -> Tensor:
    """Every so-manieth token of (samples, ..., channels), as rows in float64."""
    x_btc = x.flatten(1, -2)
    return x_btc[:, :: max(1, x_btc.shape[1] // TOKENS)].flatten(0, 1).double()
