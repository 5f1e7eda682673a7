"""Arguments of denoiser calls: by name, flat as tensors and constants, and by row of the batch."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PLACE = "#"
"""Begins the name of an item of a list or tuple argument: `image_rotary_emb/#0`."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def signature_of(module: nn.Module) -> inspect.Signature:
    """Of a module's forward; the class's, where a function that takes anything stands there."""
    own = inspect.signature(module.forward)
    if all(p.kind is not inspect.Parameter.VAR_POSITIONAL for p in own.parameters.values()):
        return own
    whole = inspect.signature(type(module).forward)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def bound(signature: inspect.Signature, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, those that the signature only knows as `**kwargs` too."""
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict]:
    """Tensors and JSON constants of nested keyword arguments, by slash-separated path.

    `None`, `return_dict` and what is neither tensor nor constant are left out.
    """
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in arguments.items():
        path = f"{prefix}{name}"
        if isinstance(value, Tensor):
            tensors[path] = value.reshape(1) if value.ndim == 0 else value
        elif path == "timestep" and isinstance(value, int | float):
            tensors[path] = torch.tensor([value])
        elif isinstance(value, Mapping):
            inner, fixed = flatten(value, f"{path}/")
            tensors |= inner
            constants |= fixed
        elif isinstance(value, list | tuple) and _holds_tensors(value):
            parts = {f"{PLACE}{place}": part for place, part in enumerate(value)}
            inner, fixed = flatten(parts, f"{path}/")
            tensors |= inner
            constants |= fixed
        elif isinstance(value, bool | int | float | str | list | tuple) and name != "return_dict":
            constants[path] = value
    return tensors, constants


def _holds_tensors(value: Sequence[Any]) -> bool:
    return any(isinstance(part, Tensor) for part in value)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested arguments that `flatten` took apart."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return {name: _listed(value) for name, value in nested.items()}


def _listed(value: Any) -> Any:
    """A tuple where all names are places, else as it is."""
    if not isinstance(value, dict):
        return value
    inner = {name: _listed(part) for name, part in value.items()}
    if inner and all(name.startswith(PLACE) for name in inner):
        return tuple(inner[f"{PLACE}{place}"] for place in range(len(inner)))
    return inner


def item_of(value: Any, row: int, batch: int) -> Any:
    """A constant as one row has it: of a list with an item for each row, a list of its own."""
    return [value[row]] if isinstance(value, list) and len(value) == batch else value


def row_of(tensor: Tensor, row: int, batch: int) -> Tensor:
    """One row of a tensor, or all of a tensor that the rows share."""
    return tensor[row : row + 1] if tensor.shape[0] == batch else tensor


def fingerprints(tensors: Mapping[str, Tensor], batch: int) -> dict[str, list[str]]:
    """A hash of the whole content of every row of every tensor: path -> one for each row.

    The bits of a row are integers a_i; their hash is the sum of a_i r_i modulo 2^64 with fixed
    pseudo-random odd r_i, computed where the tensor is, exactly, in any order. Nothing but the
    hashes of all tensors together leaves the device, at once.
    """
    sums = [_hash_of_rows(tensor, batch) for tensor in tensors.values()]
    if not sums:
        return {}
    device = sums[0].device
    found = torch.stack([total.to(device) for total in sums]).tolist()
    return {path: [f"{value:x}" for value in row] for path, row in zip(tensors, found, strict=True)}


def digest_of(*parts: str) -> str:
    """One short hash of several strings."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _hash_of_rows(tensor: Tensor, batch: int) -> Tensor:
    """(batch,) int64; rows of a tensor without a batch of its own are all of it."""
    rows = tensor if tensor.shape[0] == batch else tensor.unsqueeze(0)
    flat_bn = rows.detach().reshape(len(rows), -1).contiguous()
    if flat_bn.is_complex():
        flat_bn = torch.view_as_real(flat_bn).flatten(1)
    bits_bn = flat_bn.view(_INTEGERS[flat_bn.element_size()]).to(torch.int64)
    return (bits_bn * _multipliers(bits_bn.shape[1], bits_bn.device)).sum(1).expand(batch)


def _multipliers(count: int, device: torch.device) -> Tensor:
    """(count,) odd int64, the same on every device: the finaliser of splitmix64 over 1, 2, ..."""
    x = torch.arange(1, count + 1, device=device) * -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return (x ^ ((x >> 31) & 0x1FFFFFFFF)) | 1
