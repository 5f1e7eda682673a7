"""Groups: the layers of a denoiser that must shrink together.

A model family is data (`Family`): patterns that name its transformer blocks and the layers inside
them. `resolve` checks that data against a live denoiser and returns its `Group`s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from slimdiff.errors import SlimdiffError

Kind = Literal["query_key", "value_output", "feed_forward"]

FUSED_HINT = "call pipe.unfuse_qkv_projections() first"
ADAPTER_HINT = (
    "merge or remove adapters first (pipe.fuse_lora() then pipe.unload_lora_weights(), "
    "pipe.unload_ip_adapter())"
)


@dataclass(frozen=True)
class Attention:
    """An attention layer of a block; the paths of its linears are relative to `path`."""

    path: str
    q: str = "to_q"
    k: str = "to_k"
    v: str = "to_v"
    out: str = "to_out.0"


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward layer of a block; whether it is gated is read off the weights."""

    path: str
    up: str = "net.0.proj"
    down: str = "net.2"


@dataclass(frozen=True)
class Block:
    """The blocks whose module path matches `pattern` in full, and the layers inside each."""

    pattern: str
    layers: tuple[Attention | FeedForward, ...]


Shapes = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model family: the denoiser class, named by string, its blocks and its inputs.

    `inputs` maps the denoiser's config to the shapes of one forward's tensor arguments (batch 1);
    a nested dict stands for a nested argument.
    """

    denoiser: str
    blocks: tuple[Block, ...]
    inputs: Callable[[Mapping[str, Any]], Shapes]


@dataclass(frozen=True)
class Group:
    """Linears that shrink together.

    Attributes:
        name: path of the layer, with `.qk` or `.vo` for the two halves of an attention layer.
        kind: `query_key`, `value_output` or `feed_forward`.
        layer: module path of the attention or feed-forward layer.
        block: module path of the transformer block.
        paths: role -> module path of the linear.
        heads: attention heads (1 for feed-forward).
        width: dense width: channels per head, or hidden units.
        gated: feed-forward only: `up` has 2 * width rows, values first and gates second.
    """

    name: str
    kind: Kind
    layer: str
    block: str
    paths: Mapping[str, str] = field(hash=False)
    heads: int
    width: int
    gated: bool = False


def resolve(denoiser: nn.Module, family: Family) -> list[Group]:
    """All groups of `denoiser`, in the order of its modules.

    Raises:
        SlimdiffError: no block matches, or a layer is not what the family's data says.
    """
    groups: list[Group] = []
    for path, block in denoiser.named_modules():
        for spec in family.blocks:
            if re.fullmatch(spec.pattern, path):
                groups.extend(_groups_in(path, block, spec))
    if not groups:
        patterns = ", ".join(spec.pattern for spec in family.blocks)
        raise SlimdiffError(
            f"{type(denoiser).__name__}: no module path matches {patterns}, so there is no "
            f"attention or feed-forward layer to slim; use a denoiser with transformer blocks"
        )
    return groups


def linear_at(denoiser: nn.Module, path: str) -> nn.Linear:
    """The linear of a resolved group at `path`."""
    linear = denoiser.get_submodule(path)
    assert isinstance(linear, nn.Linear), f"{path}: is a {type(linear).__name__}"
    return linear


def _groups_in(path: str, block: nn.Module, spec: Block) -> Iterator[Group]:
    for layer in spec.layers:
        module = getattr(block, layer.path, None)
        if module is None:
            continue
        layer_path = f"{path}.{layer.path}"
        if isinstance(layer, Attention):
            yield from _attention_groups(layer_path, path, module, layer)
        else:
            yield _feed_forward_group(layer_path, path, module, layer)


def _attention_groups(
    path: str, block: str, module: nn.Module, spec: Attention
) -> tuple[Group, Group]:
    if getattr(module, "fused_projections", False):
        raise SlimdiffError(f"{path}: q, k and v are fused into one linear; {FUSED_HINT}")
    roles = {"q": spec.q, "k": spec.k, "v": spec.v, "out": spec.out}
    linears = {role: _linear(module, name, path) for role, name in roles.items()}
    heads = int(getattr(module, "heads", 0))
    query_width = _head_width(path, linears["q"].out_features, heads)
    value_width = _head_width(path, linears["out"].in_features, heads)
    for role, features in (("k", query_width * heads), ("v", value_width * heads)):
        if linears[role].out_features != features:
            raise SlimdiffError(
                f"{path}.{roles[role]}: has {linears[role].out_features} outputs, expected "
                f"{features} as its counterpart; grouped-query attention is not supported"
            )
    paths = {role: f"{path}.{name}" for role, name in roles.items()}
    qk = {role: paths[role] for role in ("q", "k")}
    vo = {role: paths[role] for role in ("v", "out")}
    return (
        Group(f"{path}.qk", "query_key", path, block, qk, heads, query_width),
        Group(f"{path}.vo", "value_output", path, block, vo, heads, value_width),
    )


def _feed_forward_group(path: str, block: str, module: nn.Module, spec: FeedForward) -> Group:
    up, down = _linear(module, spec.up, path), _linear(module, spec.down, path)
    units = down.in_features
    if up.out_features not in (units, 2 * units):
        raise SlimdiffError(
            f"{path}.{spec.up}: has {up.out_features} outputs, expected {units} or, gated, "
            f"{2 * units}, because {spec.down} has {units} inputs"
        )
    paths = {"up": f"{path}.{spec.up}", "down": f"{path}.{spec.down}"}
    gated = up.out_features == 2 * units
    return Group(path, "feed_forward", path, block, paths, 1, units, gated)


def _linear(module: nn.Module, name: str, path: str) -> nn.Linear:
    try:
        linear = module.get_submodule(name)
    except AttributeError as error:
        raise SlimdiffError(f"{path}: has no {name}; {FUSED_HINT}") from error
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        raise SlimdiffError(
            f"{path}.{name}: is a {type(linear).__name__}, expected a torch.nn.Linear with "
            f"floating-point weights; {ADAPTER_HINT}"
        )
    return linear


def _head_width(path: str, features: int, heads: int) -> int:
    if heads < 1 or features % heads:
        raise SlimdiffError(f"{path}: {features} channels do not split into {heads} heads")
    return features // heads
