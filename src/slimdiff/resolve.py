"""Resolving: a family's data checked against a live denoiser."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from slimdiff.errors import SlimdiffError
from slimdiff.groups import Attention, Block, Family, FeedForward, Group, ResNet

FUSED_HINT = "call pipe.unfuse_qkv_projections() first"
ADAPTER_HINT = (
    "merge or remove adapters first (pipe.fuse_lora() then pipe.unload_lora_weights(), "
    "pipe.unload_ip_adapter())"
)


def resolve(denoiser: nn.Module, family: Family) -> list[Group]:
    """All groups of `denoiser`, in the order of its modules.

    Raises:
        SlimdiffError: no block matches, or a layer is not what the family's data says.
    """
    groups: list[Group] = []
    removed = False
    for path, block in denoiser.named_modules():
        removed = removed or _is_removed(block)
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
            continue
        module = getattr(block, layer.path, None)
        if module is None or _is_removed(module):
            continue
        layer_path = f"{path}.{layer.path}"
        if isinstance(layer, Attention):
            yield from _attention_groups(layer_path, path, module, layer)
        else:
            yield _feed_forward_group(layer_path, path, module, layer)


def _is_removed(layer: nn.Module) -> bool:
    """Whether slimming removed it: it holds what it puts out."""
    return isinstance(getattr(layer, "constant", None), nn.Parameter)


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
    conv = getattr(module, name, None)
    if not isinstance(conv, nn.Conv2d) or not conv.weight.is_floating_point():
        raise SlimdiffError(
            f"{path}.{name}: is a {type(conv).__name__}, expected a torch.nn.Conv2d with "
            f"floating-point weights; {ADAPTER_HINT}"
        )
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    if shape != ((3, 3), (1, 1), (1, 1), (1, 1), 1):
        raise SlimdiffError(f"{path}.{name}: is {conv}, expected 3 by 3, stride 1, padding 1")
    return conv


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
