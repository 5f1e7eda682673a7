"""Which layers of a slim denoiser are refit, in the order in which they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.groups import Group, is_inward
from slimdiff.probing import STAGE
from slimdiff.refitting.replay import Call
from slimdiff.refitting.rows import can_be_refit, input_of, places_of
from slimdiff.refitting.sites import Site, find_site

KINDS = ("value_output", "query_key", "feed_forward", "resnet", "projection")
"""Groups whose layers are refit. Modulations see the timestep alone, whose moments are of as many
ranks as there were steps."""

LEFT = ("time", "norm", "depth")
"""Roles whose layers stay: time embeddings for the same reason, and what is no product of rows."""


@dataclass(frozen=True)
class Candidate:
    """A layer that may be refit.

    Attributes:
        path: of the linear or convolution.
        inward: it makes inner channels: its dense counterpart has other outputs, so the slim layer
            as it was, on the dense denoiser's inputs, says what they should be.
        site: where its output is in the stream; for an inward one its own output.
        places: tokens or pixels of one sample in its output.
        first: the first layer that gets the same input, itself if there is no other before it.
    """

    path: str
    inward: bool
    site: Site
    places: int
    first: str


def candidates(
    dense: nn.Module, slim: nn.Module, groups: Sequence[Group], call: Mapping[str, Any]
) -> list[Candidate]:
    """The layers of `slim` that can be refit, in the order in which they run in `call`.

    Left out are layers that run twice or not at all, and those that come before all narrowed ones.

    Args:
        dense, slim: of the same module paths; `slim` may lack some.
        groups: of `slim`.
        call: keyword arguments for one sample or a few.
    """
    wanted = _wanted(slim, groups)
    blocks = {path: block for path, (_, block) in wanted.items()}
    order, arguments, places = _traced(slim, wanted, set(blocks.values()), call)
    found: list[Candidate] = []
    for path in order:
        inward, block = wanted[path]
        if not _comparable(dense, slim, path, inward):
            continue
        site = Site(path, "out")
        if not inward and block in arguments:
            inner = path.removeprefix(f"{block}.")
            site = find_site(slim.get_submodule(block), block, inner, arguments[block])
        given = [o for o in order if input_of(arguments[o]) is input_of(arguments[path])]
        found.append(Candidate(path, inward, site, places[path], given[0]))
    return found


def _wanted(slim: nn.Module, groups: Sequence[Group]) -> dict[str, tuple[bool, str]]:
    """Path -> whether it is inward, and the block that encloses it and its sum."""
    wanted: dict[str, tuple[bool, str]] = {}
    for group in groups:
        for role, path in group.paths.items() if group.kind in KINDS else ():
            if role not in LEFT:
                block = group.block if group.block != path else path.rpartition(".")[0]
                inward = group.kind != "projection" and is_inward(role)
                wanted[path] = (inward, block)
    for path, module in slim.named_modules():
        if STAGE.fullmatch(path) and isinstance(module, nn.Linear | nn.Conv2d):
            wanted.setdefault(path, (False, ""))
    return {path: own for path, own in wanted.items() if can_be_refit(slim.get_submodule(path))}


def _comparable(dense: nn.Module, slim: nn.Module, path: str, inward: bool) -> bool:
    """Whether dense outputs can be told apart from slim ones by place."""
    own: Any = slim.get_submodule(path)
    try:
        other: Any = dense.get_submodule(path)
    except AttributeError:
        return False
    if inward:
        return bool(_inputs(own) == _inputs(other))
    return bool(len(own.weight) == len(other.weight))


def _inputs(layer: Any) -> int:
    return int(getattr(layer, "projection", layer.weight).shape[1])


def _traced(
    model: nn.Module, paths: Mapping[str, Any], blocks: set[str], call: Mapping[str, Any]
) -> tuple[list[str], dict[str, Call], dict[str, int]]:
    """The paths that run once, in their order, the arguments of the blocks that do, and how many
    places of a sample the layers put out."""
    seen: list[str] = []
    arguments: dict[str, Call] = {}
    places: dict[str, int] = {}

    def begin(path: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.append(path)
            arguments[path] = (args, kwargs)

        return note

    def end(path: str) -> Callable[..., None]:
        def note(layer: Any, _args: tuple, y: Tensor) -> None:
            places[path] = places_of(layer, y)

        return note

    modules = {path: model.get_submodule(path) for path in {*paths, *blocks} - {""}}
    hooks = [
        module.register_forward_pre_hook(begin(path), with_kwargs=True)
        for path, module in modules.items()
    ]
    hooks += [modules[path].register_forward_hook(end(path)) for path in paths]
    try:
        with torch.inference_mode():
            model(**call)
    finally:
        for hook in hooks:
            hook.remove()
    once = [path for path in seen if seen.count(path) == 1]
    kept = {path: arguments[path] for path in once}
    return [path for path in once if path in paths], kept, places


def together(layers: Sequence[Candidate]) -> list[list[Candidate]]:
    """The layers in their order, those that are solved in one with the same inputs side by side:
    inward ones that get the same tensor, such as those of queries, keys and values."""
    parts: list[list[Candidate]] = []
    for layer in layers:
        before = parts[-1][-1] if parts else None
        if before and before.inward and layer.inward and before.first == layer.first:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return parts


def units(model: nn.Module, groups: Sequence[Group], call: Mapping[str, Any]) -> list[str]:
    """Modules whose outputs are worth keeping: stages, layers of groups, and all between them.

    Those that run more than once in a call are none.
    """
    layers = {group.layer for group in groups}
    layers |= {group.paths["conv1"] for group in groups if "conv1" in group.paths}
    parts = {path: path.split(".") for path in layers}
    wanted = {".".join(own[:end]) for own in parts.values() for end in range(1, len(own) + 1)}
    wanted |= {path for path, _ in model.named_modules() if STAGE.fullmatch(path)}
    count: Counter[str] = Counter()

    def counting(path: str) -> Callable[..., None]:
        return lambda *_: count.update([path])

    hooks = [
        module.register_forward_pre_hook(counting(path))
        for path, module in model.named_modules()
        if path in wanted
    ]
    try:
        with torch.inference_mode():
            model(**call)
    finally:
        for hook in hooks:
            hook.remove()
    return [path for path in sorted(wanted) if count[path] == 1]
