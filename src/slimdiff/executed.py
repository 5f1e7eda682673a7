"""Executed: which layers run in each call of a denoiser.

Whatever answers a call from an earlier one skips layers, known by name or not. Calls of the same
arguments must run the same layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from slimdiff.calls import flatten
from slimdiff.errors import SlimdiffError
from slimdiff.groups import Group

ALWAYS = ("query_key", "value_output", "resnet")
"""Kinds of group that no ordinary model runs only now and then; some route tokens to one of several
feed-forward layers."""


class Executed:
    """Notes the layers that run in a call, and compares them with those of earlier calls.

    Attributes:
        handles: of its hooks, for the caller to remove.
    """

    def __init__(self, denoiser: nn.Module, groups: Sequence[Group]) -> None:
        """Hooks the layers of `groups`.

        Raises:
            SlimdiffError: the denoiser lacks one; names it.
        """
        modules = _modules(denoiser, groups)
        paths = {path for g in groups if g.kind in ALWAYS for path in g.paths.values()}
        self._ran: set[str] = set()
        self._first: dict[str, tuple[int, frozenset[str]]] = {}
        self._signature, self._calls = "", 0
        self.handles = [
            modules[path].register_forward_pre_hook(self._noting(path)) for path in sorted(paths)
        ]

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """A call begins."""
        tensors, constants = flatten(arguments)
        named = {path: x.ndim for path, x in sorted(tensors.items())}
        self._signature = json.dumps([named, constants], sort_keys=True, default=str)
        self._ran.clear()
        self._calls += 1

    def end(self) -> None:
        """The call has ended.

        Raises:
            SlimdiffError: it ran other layers than an earlier call of the same arguments.
        """
        ran = frozenset(self._ran)
        call, expected = self._first.setdefault(self._signature, (self._calls, ran))
        if ran != expected:
            path = min(ran ^ expected)
            (one, other) = (self._calls, call) if path in ran else (call, self._calls)
            raise SlimdiffError(
                f"{path}: ran in denoiser call {one}, but not in call {other}, so something over "
                f"the denoiser skips layers, as caches do; expected the same layers in every call: "
                f"switch it off, record, and switch it on again on the slim model"
            )

    def _noting(self, path: str) -> Any:
        return lambda *_: self._ran.add(path)


def _modules(denoiser: nn.Module, groups: Sequence[Group]) -> dict[str, nn.Module]:
    there = dict(denoiser.named_modules(remove_duplicate=False))
    paths = {path for group in groups for path in (*group.paths.values(), group.layer, group.block)}
    if missing := sorted(paths - set(there)):
        raise SlimdiffError(
            f"{missing[0]}: {type(denoiser).__name__} has no such module, so the groups are those "
            f"of another denoiser; give slimdiff.groups_of(denoiser), or leave groups out"
        )
    return there
