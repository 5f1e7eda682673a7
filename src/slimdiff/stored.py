"""Stored dtypes: what each tensor of a model has on disk, and keeping it when the model is saved.

A folder may hold several: Wan and many others keep norms and tables in float32 beside a bfloat16
rest. A model that is read in another dtype is saved again tensor by tensor in what it had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from slimdiff.budget import Saving
from slimdiff.errors import SlimdiffError
from slimdiff.folders import read_json
from slimdiff.integrity import ENCODER_WEIGHTS, WEIGHTS

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Floating dtypes by the names that safetensors gives them."""

DERIVED = {
    "projection": ("weight",),
    "constant": ("to_out.0.bias", "net.2.bias", "conv2.bias"),
}
"""Parameters of slim layers, and what in the dense layer they have the dtype of."""


def weight_files(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """Tensor name -> safetensors file, of one model's folder; empty if there is none.

    Args:
        folder: of a model of diffusers or transformers.
        variant: its weights, or where there are none of it, as in diffusers, the plain ones.
    """
    for middle in dict.fromkeys((f".{variant}" if variant else "", "")):
        for stem in (WEIGHTS, ENCODER_WEIGHTS):
            index = folder / f"{stem}.safetensors.index{middle}.json"
            if index.is_file():
                named = read_json(index)["weight_map"]
                return {name: folder / file for name, file in named.items()}
            single = folder / f"{stem}{middle}.safetensors"
            if single.is_file():
                return dict.fromkeys(_names(single), single)
    return {}


def stored_dtypes(folder: Path, variant: str | None = None) -> dict[str, torch.dtype]:
    """Tensor name -> dtype on disk, of all shards; integers are left out. No tensor is read."""
    from safetensors import safe_open

    files = weight_files(folder, variant)
    found: dict[str, torch.dtype] = {}
    for path in dict.fromkeys(files.values()):
        with safe_open(path, framework="pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
        found |= {name: DTYPES[kind] for name, kind in kinds.items() if kind in DTYPES}
    return found


def saved_dtypes(module: nn.Module, stored: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """What every floating parameter and persistent buffer of a model is to be saved in.

    That which the tensor of the same name has on disk. What slimming made anew has the dtype of
    what it came from: a factor that of the weight, a constant that of the bias that it takes the
    place of. Other names (old folders are renamed when they are read) take the dtype that most
    tensors have.
    """
    if not stored:
        return {}
    usual = Counter(stored.values()).most_common(1)[0][0]
    tensors = module.state_dict(keep_vars=True)
    return {
        name: _of(name, stored) or usual for name, t in tensors.items() if t.is_floating_point()
    }


def saving_of(module: nn.Module, folder: Path, variant: str | None = None) -> Saving:
    """How a model will be saved that is to keep the dtypes that it has in its folder."""
    files = dict.fromkeys(weight_files(folder, variant).values())
    return Saving(
        saved_dtypes(module, stored_dtypes(folder, variant)), sum(map(_header_bytes, files))
    )


def round_(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give every parameter the value that it will have once saved in these dtypes, in place.

    Raises:
        SlimdiffError: a number is beyond what the dtype holds; names the tensor.
    """
    for name, tensor in module.state_dict(keep_vars=True).items():
        kind = dtypes.get(name, tensor.dtype)
        if kind != tensor.dtype:
            rounded = tensor.detach().to(kind).to(tensor.dtype)
            _refuse_overflow(name, tensor, rounded, kind)
            tensor.data.copy_(rounded)


def cast_(
    module: nn.Module, dtypes: Mapping[str, torch.dtype], files: Mapping[str, Path] | None = None
) -> None:
    """Cast every parameter and persistent buffer to its dtype, in place.

    Args:
        module: in whatever dtype it ran.
        dtypes: by name; what is not named stays as it is.
        files: of the model as it was read: a tensor that ran in fewer bits and was not changed
            gets back what it had.

    Raises:
        SlimdiffError: a number is beyond what the dtype holds; names the tensor.
    """
    for name, tensor in module.state_dict(keep_vars=True).items():
        kind = dtypes.get(name, tensor.dtype)
        if kind != tensor.dtype:
            cast = _original(name, tensor, kind, files or {})
            cast = tensor.detach().to(kind) if cast is None else cast
            _refuse_overflow(name, tensor, cast, kind)
            tensor.data = cast


def refuse_other_weights(module: nn.Module, folder: Path, variant: str | None = None) -> None:
    """Load what was saved in `folder`, and refuse it if a tensor is not bit for bit the module's.

    Raises:
        SlimdiffError: names the tensor.
    """
    from safetensors import safe_open

    tensors, files = module.state_dict(), weight_files(folder, variant)
    for path in dict.fromkeys(files.values()):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                own, saved = tensors.get(name), file.get_tensor(name)
                if own is None or not _same(own.cpu(), saved):
                    raise SlimdiffError(
                        f"{path}: {name} is not what was measured; is the disk full or faulty, or "
                        f"does something rename or convert weights as they are saved?"
                    )


def _of(name: str, stored: Mapping[str, torch.dtype]) -> torch.dtype | None:
    if name in stored:
        return stored[name]
    path, _, leaf = name.rpartition(".")
    names = (f"{path}.{origin}" for origin in DERIVED.get(leaf, ()))
    return next((stored[origin] for origin in names if origin in stored), None)


def _original(
    name: str, tensor: Tensor, kind: torch.dtype, files: Mapping[str, Path]
) -> Tensor | None:
    """What a tensor was on disk, if it was rounded when it was read and not changed since."""
    from safetensors import safe_open

    if kind.itemsize <= tensor.dtype.itemsize or name not in files:
        return None
    with safe_open(files[name], framework="pt") as file:
        if file.get_slice(name).get_shape() != list(tensor.shape):
            return None
        original: Tensor = file.get_tensor(name).to(tensor.device)
    return original if _same(original.to(tensor.dtype), tensor.detach()) else None


def _same(a: Tensor, b: Tensor) -> bool:
    bits = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b))
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(*bits)


def _refuse_overflow(name: str, before: Tensor, after: Tensor, kind: torch.dtype) -> None:
    if not after.float().isfinite().all() and before.detach().float().isfinite().all():
        largest = float(before.detach().abs().max())
        raise SlimdiffError(
            f"{name}: holds numbers up to {largest:.1e}, beyond what {kind} of the model's folder "
            f"holds; choose --dtype float32 or bfloat16, which is then saved"
        )


def _header_bytes(path: Path) -> int:
    """Of a safetensors file: the length of the header in eight bytes, and the header."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())
