"""Streams: the token sequences of an attention layer, recorded as its softmax sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.groups import Group
from slimdiff.padding import Counting
from slimdiff.recorder import Recorder


def counting_of(recorder: Recorder, group: Group, role: str, x: Tensor) -> Counting | None:
    """Which tokens count of x (batch, tokens, channels) at a role of a group; None: all."""
    return None if recorder.padding is None else recorder.padding.of(group, role, x)


def on_outputs(
    recorder: Recorder,
    denoiser: nn.Module,
    group: Group,
    roles: Sequence[str],
    add: Callable[[Tensor], None],
) -> list[Any]:
    """Hand on the tokens that the linears of these roles put out in one call, joined.

    The streams of joint attention are one sequence to its softmax.
    """
    seen: dict[str, tuple[Tensor, Counting | None]] = {}

    def hook(role: str, out_bti: Tensor) -> None:
        if role in seen:  # the call before was broken off
            seen.clear()
        seen[role] = (out_bti, counting_of(recorder, group, role, out_bti))
        if len(seen) < len(roles):
            return
        assert recorder.padding is not None, "`recording` sets it"
        outputs, counting = zip(*seen.values(), strict=True)
        with recorder.only(recorder.padding.joined(counting, outputs)):
            add(torch.cat(outputs, 1) if len(outputs) > 1 else out_bti)
        seen.clear()

    return [
        denoiser.get_submodule(group.paths[role]).register_forward_hook(
            lambda _module, _args, out, role=role: hook(role, out)
        )
        for role in roles
    ]
