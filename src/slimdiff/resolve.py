"""Resolving: a family's data checked against a live denoiser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from slimdiff.errors import SlimdiffError
from slimdiff.groups import (
    ADDED,
    SECOND_STREAM,
    Attention,
    Block,
    Family,
    FeedForward,
    Group,
    Modulation,
    ResNet,
    Shared,
)

FUSED_HINT = "call pipe.unfuse_qkv_projections() first"
ADAPTER_HINT = (
    "merge or remove adapters first (pipe.fuse_lora() then pipe.unload_lora_weights(), "
    "pipe.unload_ip_adapter())"
)
NATURE = ("unscaled", "tied", "fixed_heads")
"""Said of an attention layer, and of its groups."""


def resolve(denoiser: nn.Module, family: Family) -> list[Group]:
    """All groups of `denoiser`, in the order of its modules.

    Raises:
        SlimdiffError: no block matches, or a layer is not what the family's data says.
    """
    groups: list[Group] = []
    removed = any(_is_removed(module) for module in denoiser.modules())
    for path, block in denoiser.named_modules():
        for spec in family.blocks:
            if re.fullmatch(spec.pattern, path):
                groups.extend(_groups_in(path, block, spec))
    if not groups and not removed:
        patterns = ", ".join(spec.pattern for spec in family.blocks)
        raise SlimdiffError(
            f"{type(denoiser).__name__}: no module path matches {patterns}, so there is no "
            f"layer to slim; use a denoiser with transformer blocks or ResNets"
        )
    return groups


def _groups_in(path: str, block: nn.Module, spec: Block) -> Iterator[Group]:
    for layer in spec.layers:
        if isinstance(layer, ResNet):
            if not _is_removed(block):
                yield _resnet_group(path, block, layer)
        elif isinstance(layer, Modulation):
            yield _modulation_group(path, block, layer, spec.output)
        elif (own := _found(block, layer.path)) is None or _is_removed(own):
            continue
        elif isinstance(layer, Attention):
            yield from _attention_groups(path, block, layer, spec.output)
        else:
            yield _feed_forward_group(path, block, layer, spec.output)


def _found(block: nn.Module, path: str) -> nn.Module | None:
    return dict(block.named_modules()).get(path)


def _is_removed(layer: nn.Module) -> bool:
    """Whether slimming removed it: it holds what it puts out."""
    return isinstance(getattr(layer, "constant", None), nn.Parameter)


def _attention_groups(
    block_path: str, block: nn.Module, spec: Attention, output: int
) -> Iterator[Group]:
    path, module = f"{block_path}.{spec.path}", block.get_submodule(spec.path)
    if getattr(module, "fused_projections", False):
        raise SlimdiffError(f"{path}: q, k and v are fused into one linear; {FUSED_HINT}")
    paths, columns = _attention_paths(block_path, block, spec)
    linears = {
        role: _linear(block, own.removeprefix(f"{block_path}."), block_path)
        for role, own in paths.items()
    }
    inner = linears["v"].out_features
    if "out" in columns:
        columns["out"] = (0, inner)
    elif linears["out"].in_features != inner:
        raise SlimdiffError(
            f"{paths['v']}: has {inner} outputs, but {paths['out']} takes "
            f"{linears['out'].in_features}; grouped-query attention is not supported"
        )
    heads = int(getattr(module, spec.heads, 0))
    query_width = _head_width(path, linears["q"].out_features, heads)
    value_width = _head_width(path, inner, heads)
    for role, linear in linears.items():
        expected = (query_width if role[0] in "qk" else value_width) * heads
        if not role.startswith("out") and linear.out_features != expected:
            raise SlimdiffError(
                f"{paths[role]}: has {linear.out_features} outputs, expected {expected} as its "
                f"counterpart; grouped-query attention is not supported"
            )
    qk = {role: own for role, own in paths.items() if role[0] in "qk"}
    vo = {role: own for role, own in paths.items() if role[0] in "vo"}
    more: dict[str, Any] = {name: getattr(spec, name) for name in NATURE}
    more |= {"output": output, "query_width": query_width}
    if not (spec.fixed_queries or _normalised(module)):
        yield Group(f"{path}.qk", "query_key", path, block_path, qk, heads, query_width, **more)
    more["columns"] = columns
    yield Group(f"{path}.vo", "value_output", path, block_path, vo, heads, value_width, **more)


def _attention_paths(
    block_path: str, block: nn.Module, spec: Attention
) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Role -> path of every linear, and which of them are shared (their columns are not known)."""
    path, module = f"{block_path}.{spec.path}", block.get_submodule(spec.path)
    paths = {role: f"{path}.{getattr(spec, role)}" for role in ("q", "k", "v")}
    columns: dict[str, tuple[int, int]] = {}
    if isinstance(spec.out, Shared):
        paths["out"], columns["out"] = f"{block_path}.{spec.out.path}", (0, 0)
    else:
        paths["out"] = f"{path}.{spec.out}"
    for role, name in SECOND_STREAM.items():
        if getattr(module, name, None) is not None:
            paths[role + ADDED] = f"{path}.{name}"
    return paths, columns


def _normalised(attention: nn.Module) -> bool:
    return any(getattr(attention, name, None) is not None for name in ("norm_q", "norm_k"))


def _feed_forward_group(block_path: str, block: nn.Module, spec: FeedForward, output: int) -> Group:
    layer = f"{block_path}.{spec.path}"
    shared = isinstance(spec.down, Shared)
    down_name = spec.down.path if isinstance(spec.down, Shared) else f"{spec.path}.{spec.down}"
    plain = bool(spec.plain) and hasattr(block.get_submodule(spec.path), spec.plain)
    up = spec.plain if plain else spec.up
    names = {"up": f"{spec.path}.{up}".rstrip("."), "down": down_name}
    if spec.gate and not plain:
        names["gate"] = f"{spec.path}.{spec.gate}"
    kind: type[nn.Linear] | type[nn.Conv2d] = nn.Linear
    if spec.depth:
        names["depth"], kind = f"{spec.path}.{spec.depth}", nn.Conv2d
    layers = {role: _weighted(block, name, block_path, kind) for role, name in names.items()}
    rows, units = layers["up"].weight.shape[0], layers["down"].weight.shape[1]
    columns = {}
    if shared:
        columns, units = {"down": (units - rows, units)}, rows
    if rows not in (units, 2 * units) or any(
        len(layers[role].weight) != rows for role in ("depth", "gate") if role in layers
    ):
        raise SlimdiffError(
            f"{block_path}.{names['up']}: has {rows} outputs, expected {units} or, gated, "
            f"{2 * units}, because {names['down']} has {units} inputs"
        )
    return Group(
        layer,
        "feed_forward",
        layer,
        block_path,
        {role: f"{block_path}.{name}" for role, name in names.items()},
        1,
        units,
        rows == 2 * units,
        columns=columns,
        output=output,
    )


def _modulation_group(block_path: str, block: nn.Module, spec: Modulation, output: int) -> Group:
    path, linear = f"{block_path}.{spec.path}", _linear(block, spec.path, block_path)
    rows, columns = linear.out_features, linear.in_features
    factored = getattr(linear, "projection", None)
    width = min(rows, columns) if factored is None else len(factored)
    # The factors hold r (rows + columns) numbers instead of rows * columns.
    largest = (rows * columns - 1) // (rows + columns) if factored is None else None
    return Group(
        path,
        "modulation",
        path,
        block_path,
        {"linear": path},
        1,
        width,
        output=output,
        source="modulation" if spec.shared else "",
        largest=largest,
    )


def _resnet_group(path: str, module: nn.Module, spec: ResNet) -> Group:
    conv1, conv2 = _convolution(module, spec.conv1, path), _convolution(module, spec.conv2, path)
    norm, channels = getattr(module, spec.norm, None), conv1.out_channels
    if not isinstance(norm, nn.GroupNorm) or {norm.num_channels, conv2.in_channels} != {channels}:
        raise SlimdiffError(
            f"{path}.{spec.norm}: is {norm}, expected a GroupNorm of {channels} channels, as "
            f"{spec.conv1} puts out and {spec.conv2} takes"
        )
    paths = {"conv1": spec.conv1, "norm": spec.norm, "conv2": spec.conv2}
    rows = channels
    if getattr(module, spec.time, None) is not None:
        paths["time"], rows = spec.time, _linear(module, spec.time, path).out_features
    if rows not in (channels, 2 * channels):
        raise SlimdiffError(f"{path}.{spec.time}: has {rows} outputs, expected {channels} or twice")
    full = {role: f"{path}.{name}" for role, name in paths.items()}
    step = channels // norm.num_groups
    return Group(path, "resnet", path, path, full, 1, channels, rows == 2 * channels, step)


def _convolution(module: nn.Module, name: str, path: str) -> nn.Conv2d:
    conv = _weighted(module, name, path, nn.Conv2d)
    assert isinstance(conv, nn.Conv2d)
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    if shape != ((3, 3), (1, 1), (1, 1), (1, 1), 1):
        raise SlimdiffError(f"{path}.{name}: is {conv}, expected 3 by 3, stride 1, padding 1")
    return conv


def _linear(module: nn.Module, name: str, path: str) -> nn.Linear:
    linear = _weighted(module, name, path, nn.Linear)
    assert isinstance(linear, nn.Linear)
    return linear


def _weighted(
    module: nn.Module, name: str, path: str, kind: type[nn.Linear] | type[nn.Conv2d]
) -> nn.Linear | nn.Conv2d:
    """The linear or convolution at `name` inside the module at `path`."""
    try:
        layer = module.get_submodule(name)
    except AttributeError as error:
        raise SlimdiffError(f"{path}: has no {name}; {FUSED_HINT}") from error
    if not isinstance(layer, kind) or not layer.weight.is_floating_point():
        raise SlimdiffError(
            f"{path}.{name}: is a {type(layer).__name__}, expected a torch.nn.{kind.__name__} with "
            f"floating-point weights; {ADAPTER_HINT}"
        )
    return layer


def _head_width(path: str, features: int, heads: int) -> int:
    if heads < 1 or features % heads:
        raise SlimdiffError(f"{path}: {features} channels do not split into {heads} heads")
    return features // heads
