"""Costs: parameters, bytes and multiply-accumulates (MACs) of a denoiser and its groups by width.

MACs are counted on the meta device by torch's flop counter, which sees attention products; no
arithmetic is done and no weight is copied. Bytes are those of the saved weights: each tensor counts
in the dtype that it will be saved in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from slimdiff.budget import Saving
from slimdiff.calls import flatten, nest
from slimdiff.denoiser import settings
from slimdiff.errors import SlimdiffError
from slimdiff.families import family_of
from slimdiff.groups import FACTORED, Given, Group, Integers, Shapes, is_inward
from slimdiff.layers import is_fused, layer_at, sides_of, weight_of


@dataclass(frozen=True)
class GroupCost:
    """Cost of one group per channel of its inner width: heads * width.

    Attributes:
        params: parameters per inner channel.
        fixed: parameters that stay whatever the width (the bias of the last layer).
        macs: multiply-accumulates per inner channel in one forward.
        dense: inner channels, parameters and MACs of a layer that is no sum over its channels
            unless it shrinks (a linear that would become two).
        spared: MACs of the dense denoiser that are spared at any width (a fused upsampler).
        bytes: of the parameters of one inner channel.
    """

    params: int
    fixed: int
    macs: int
    dense: tuple[int, int, int] | None = None
    spared: int = 0
    bytes: int = 0

    def of(self, metric: str, inner: int) -> int:
        """Cost at `inner` channels; fixed parameters are left out of it."""
        if self.dense is not None and self.dense[0] == inner:
            params, macs = self.dense[1:]
            if metric == "bytes":  # both factors are of the dense weight's dtype
                return params * self.bytes // self.params
            return params if metric == "params" else macs
        each = {"params": self.params, "macs": self.macs, "bytes": self.bytes}
        return inner * each[metric]


@dataclass(frozen=True)
class Costs:
    """Costs of a denoiser as it stands.

    Attributes:
        params: parameters of the whole denoiser.
        macs: MACs of one forward at batch 1.
        groups: group name -> cost per inner channel.
        bytes: of all that is saved of it: parameters and persistent buffers.
    """

    params: int
    macs: int
    groups: dict[str, GroupCost]
    bytes: int = 0

    def total(self, metric: str) -> int:
        """The whole denoiser's `params`, `macs` or `bytes`."""
        return {"params": self.params, "macs": self.macs, "bytes": self.bytes}[metric]

    def spared(self, metric: str) -> int:
        """What is spared while nothing shrinks."""
        return sum(cost.spared for cost in self.groups.values()) if metric == "macs" else 0


def measure(
    denoiser: nn.Module,
    groups: Sequence[Group],
    inputs: Mapping[str, Any],
    fused: Sequence[str] = (),
    saving: Saving | None = None,
) -> Costs:
    """Costs of `denoiser` for a forward with these inputs (batch 1; values are not used).

    Args:
        denoiser: on any device, meta too.
        groups: of it.
        inputs: of one call.
        fused: the upsamplers of it that are to be fused.
        saving: how it will be saved, if not as it stands; bytes are counted so.

    Raises:
        SlimdiffError: the denoiser does not run on inputs of these shapes.
    """
    rows: dict[str, int] = {}
    paths = {path for group in groups for path in group.paths.values()}
    handles = [_count_rows(denoiser, path, rows) for path in sorted(paths)]
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            functional_call(denoiser, _meta_state(denoiser), (), _meta_inputs(denoiser, inputs))
    except (RuntimeError, ValueError, TypeError) as error:
        raise SlimdiffError(
            f"{type(denoiser).__name__}: cannot run on inputs of these shapes ({error})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    scores = {group.layer: _scores(group, rows) for group in groups if group.kind == "query_key"}
    saving, tensors = saving or Saving(), denoiser.state_dict(keep_vars=True)
    sizes = _sizes(tensors, saving.dtypes)
    costs = {
        group.name: _group_cost(denoiser, group, rows, scores, fused, sizes) for group in groups
    }
    saved = {id(t): t.numel() * sizes[name] for name, t in tensors.items()}  # tied ones once
    return Costs(
        parameters(denoiser),
        counter.get_total_flops() // 2,
        costs,
        sum(saved.values()) + saving.header,
    )


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _sizes(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, int]:
    """Bytes of one number of each tensor, as it will be saved."""
    return {name: dtypes.get(name, t.dtype).itemsize for name, t in tensors.items()}


def example_inputs(denoiser: nn.Module) -> dict[str, Any]:
    """Inputs of one forward at the denoiser's native size, on the meta device."""
    shapes = family_of(denoiser).inputs(settings(denoiser))
    return _meta_tensors(shapes, next(denoiser.parameters()).dtype)


def _meta_tensors(shapes: Shapes, dtype: torch.dtype) -> dict[str, Any]:
    return {name: _meta_value(shape, dtype) for name, shape in shapes.items()}


def _meta_value(shape: Any, dtype: torch.dtype) -> Any:
    if isinstance(shape, dict):
        return _meta_tensors(shape, dtype)
    if isinstance(shape, Given):
        return shape.value
    if isinstance(shape, list):
        return tuple(_meta_value(part, dtype) for part in shape)
    if isinstance(shape, Integers):
        return torch.empty(shape.shape, dtype=torch.long, device="meta")
    return torch.empty(shape, dtype=dtype, device="meta")


def _meta_state(denoiser: nn.Module) -> dict[str, Tensor]:
    state = dict(denoiser.named_parameters()) | dict(denoiser.named_buffers())
    return {name: _one_dtype(tensor) for name, tensor in state.items()}


def _one_dtype(tensor: Tensor) -> Tensor:
    """On the meta device; numbers with a point all of one dtype, since MACs do not depend on it
    and a denoiser of several dtypes does not run on the inputs of another run."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, device="meta", dtype=dtype)


def _meta_inputs(denoiser: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    if family_of(denoiser).text:  # transformers looks at the values of a mask, which saves no MACs
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
    tensors, constants = flatten(inputs)
    return nest({path: _one_dtype(tensor) for path, tensor in tensors.items()} | constants)


def _count_rows(denoiser: nn.Module, path: str, rows: dict[str, int]) -> Any:
    def hook(_module: nn.Module, _args: tuple, y: Tensor) -> None:
        count = y[:, 0].numel() if y.ndim == 4 else y.shape[:-1].numel()
        rows[path] = rows.get(path, 0) + count

    return layer_at(denoiser, path).register_forward_hook(hook)


def _group_cost(
    denoiser: nn.Module,
    group: Group,
    rows: Mapping[str, int],
    scores: Mapping[str, int],
    fused: Sequence[str],
    sizes: Mapping[str, int],
) -> GroupCost:
    if group.kind in FACTORED:
        cost = _factored_cost(denoiser, group, rows, fused)
        return replace(cost, bytes=cost.params * sizes[f"{group.layer}.weight"])
    params = macs = fixed = bytes_ = 0
    for role, path in group.paths.items():
        own = weight_of(denoiser, group, role).numel() // group.inner
        bias = layer_at(denoiser, path).bias
        biases = 0 if bias is None or group.columns.get(role, (0,))[0] else bias.numel()
        inward = biases // group.inner if is_inward(role) else 0
        params += own + inward
        bytes_ += own * sizes[f"{path}.weight"] + inward * sizes.get(f"{path}.bias", 0)
        fixed += 0 if is_inward(role) else biases
        macs += 0 if role == "norm" else own * rows.get(path, 0)
    # Weighted values cost what scores do; where queries and keys keep their width, values are
    # padded to it, and a narrower width saves nothing there.
    return GroupCost(params, fixed, macs + scores.get(group.layer, 0), bytes=bytes_)


def _factored_cost(
    denoiser: nn.Module, group: Group, rows: Mapping[str, int], fused: Sequence[str]
) -> GroupCost:
    """Of rank r, a layer of o outputs and i inputs holds r (o + i) numbers instead of o i.

    The inputs of a convolution are those of all its taps. In a fused upsampler these are multiplied
    for every fourth row.
    """
    layer, path = layer_at(denoiser, group.layer), group.layer
    assert not isinstance(layer, nn.GroupNorm)
    outputs, inputs = sides_of(layer)
    per_rank, vectors = outputs + inputs, rows.get(path, 0)
    fixed = 0 if layer.bias is None else outputs
    whole = group.largest is not None

    def macs(is_so: bool) -> tuple[int, int]:
        """Of one channel of the rank, and of the layer as it is, fused or not."""
        multiplied = vectors // 4 if is_so else vectors
        own = outputs * vectors + inputs * multiplied
        return own, outputs * inputs * multiplied if whole else group.width * own

    already = is_fused(denoiser, group)
    own, dense = macs(already or group.upsampler in fused)
    held = outputs * inputs if whole else group.width * per_rank
    return GroupCost(per_rank, fixed, own, (group.width, held, dense), macs(already)[1] - dense)


def _scores(group: Group, rows: Mapping[str, int]) -> int:
    """Queries * keys: MACs of the scores per inner channel of a query-key group."""
    queries, keys = (
        sum(rows.get(group.paths[role], 0) for role in group.streams(kind)) for kind in ("q", "k")
    )
    return queries * keys
