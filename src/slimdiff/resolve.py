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
    Kind,
    Modulation,
    Projection,
    ResNet,
    Shared,
)
from slimdiff.layers import FUSED_HINT, convolution_in, linear_in, sides_of, weighted_in
from slimdiff.wrapped import refuse_wrapped

NATURE = ("unscaled", "tied", "fixed_heads")
"""Said of an attention layer, and of its groups."""


def resolve(denoiser: nn.Module, family: Family) -> list[Group]:
    """All groups of `denoiser`, in the order of its modules.

    Raises:
        SlimdiffError: no block matches, a layer is not what the family's data says, or something
            stands over the denoiser (see `refuse_wrapped`).
    """
    refuse_wrapped(denoiser)
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
            linear = linear_in(block, layer.path, path)
            more = {"output": spec.output, "source": "modulation" if layer.shared else ""}
            yield _factored_group("modulation", f"{path}.{layer.path}", path, linear, **more)
        elif isinstance(layer, Projection):
            if (found := _projection(path, block, layer.path)) is not None:
                name, upsampler = f"{path}.{layer.path}".rstrip("."), path * layer.upsampled
                yield _factored_group("projection", name, path, found, upsampler=upsampler)
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
        role: linear_in(block, own.removeprefix(f"{block_path}."), block_path)
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
    layers = {role: weighted_in(block, name, block_path, kind) for role, name in names.items()}
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
        text=spec.text,
    )


def _factored_group(
    kind: Kind, path: str, block_path: str, layer: nn.Linear | nn.Conv2d, **more: Any
) -> Group:
    projection = getattr(layer, "projection", None)
    rows, columns = sides_of(layer)
    width = min(rows, columns) if projection is None else len(projection)
    # The factors hold r (rows + columns) numbers instead of rows * columns.
    largest = (rows * columns - 1) // (rows + columns) if projection is None else None
    paths = {"linear": path}
    return Group(path, kind, path, block_path, paths, 1, width, largest=largest, **more)


def _projection(path: str, block: nn.Module, name: str) -> nn.Linear | nn.Conv2d | None:
    layer = _found(block, name)
    if layer is None:
        return None
    if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or layer.padding_mode != "zeros"):
        raise SlimdiffError(f"{path}.{name}: is {layer}, expected one group and zero padding")
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    return weighted_in(block, name, path, kind)


def _resnet_group(path: str, module: nn.Module, spec: ResNet) -> Group:
    conv1, conv2 = (
        convolution_in(module, spec.conv1, path),
        convolution_in(module, spec.conv2, path),
    )
    norm, channels = getattr(module, spec.norm, None), conv1.out_channels
    if not isinstance(norm, nn.GroupNorm) or {norm.num_channels, conv2.in_channels} != {channels}:
        raise SlimdiffError(
            f"{path}.{spec.norm}: is {norm}, expected a GroupNorm of {channels} channels, as "
            f"{spec.conv1} puts out and {spec.conv2} takes"
        )
    paths = {"conv1": spec.conv1, "norm": spec.norm, "conv2": spec.conv2}
    rows = channels
    if getattr(module, spec.time, None) is not None:
        paths["time"], rows = spec.time, linear_in(module, spec.time, path).out_features
    if rows not in (channels, 2 * channels):
        raise SlimdiffError(f"{path}.{spec.time}: has {rows} outputs, expected {channels} or twice")
    full = {role: f"{path}.{name}" for role, name in paths.items()}
    step = channels // norm.num_groups
    return Group(path, "resnet", path, path, full, 1, channels, rows == 2 * channels, step)


def _head_width(path: str, features: int, heads: int) -> int:
    if heads < 1 or features % heads:
        raise SlimdiffError(f"{path}: {features} channels do not split into {heads} heads")
    return features // heads
