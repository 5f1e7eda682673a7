"""Weights in safetensors shards: read tensor by tensor, written shard by shard, joined."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slimdiff.errors import SlimdiffError
from slimdiff.folders import read_json
from slimdiff.integrity import WEIGHTS


class Shards:
    """The weights in a denoiser's folder, whole or in shards; every look-up reads one tensor.

    Raises:
        SlimdiffError: there are none in safetensors.
    """

    def __init__(self, folder: Path, variant: str | None = None) -> None:
        from safetensors import safe_open

        middle = "" if variant is None else f".{variant}"
        single = folder / f"{WEIGHTS}{middle}.safetensors"
        index = folder / f"{WEIGHTS}.safetensors.index{middle}.json"
        if single.is_file():
            with safe_open(single, framework="pt") as file:
                self.names = {name: single for name in file.keys()}
        elif index.is_file():
            named = read_json(index)["weight_map"]
            self.names = {name: folder / file for name, file in named.items()}
        else:
            raise SlimdiffError(f"{single}: no such file, nor {index.name}; expected safetensors")

    def read(self, name: str) -> Tensor:
        """One tensor, copied into memory."""
        from safetensors import safe_open

        with safe_open(self.names[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).clone()
            return tensor

    def parameters_of(self, denoiser: nn.Module) -> Mapping[str, Tensor]:
        """The parameters of a denoiser, by name; each is read when it is looked up."""
        return _Parameters(self, [name for name, _ in denoiser.named_parameters()])

    def refuse_strange(self, denoiser: nn.Module) -> None:
        """Refuse weights of another model.

        Raises:
            SlimdiffError: a parameter of the denoiser is missing.
        """
        missing = {name for name, _ in denoiser.named_parameters()} - set(self.names)
        if missing:
            raise SlimdiffError(
                f"{min(missing)}: is not among the weights; were files of two models mixed?"
            )


class _Parameters(Mapping[str, Tensor]):
    """Some of the tensors in shards."""

    def __init__(self, shards: Shards, names: Sequence[str]) -> None:
        self.shards, self.names = shards, names

    def __getitem__(self, name: str) -> Tensor:
        return self.shards.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class ShardWriter:
    """Writes tensors into files of at most `limit` bytes, and their index in the end."""

    def __init__(self, folder: Path, stem: str, variant: str | None, limit: int) -> None:
        self.folder, self.stem, self.limit = folder, stem, limit
        self.middle = "" if variant is None else f".{variant}"
        self.waiting: dict[str, Tensor] = {}
        self.files: list[list[str]] = []
        self.total = self.size = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; a full shard is written first."""
        bytes_ = tensor.numel() * tensor.element_size()
        if self.waiting and self.size + bytes_ > self.limit:
            self._flush()
        self.waiting[name] = tensor.contiguous()
        self.size += bytes_
        self.total += bytes_

    def close(self) -> None:
        """Write what waits, and give the files the names that diffusers looks for."""
        self._flush()
        count = len(self.files)
        if count == 1:
            self._part(0).rename(self.folder / f"{self.stem}{self.middle}.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.files):
            name = f"{self.stem}{self.middle}-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / name)
            weight_map |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        path = self.folder / f"{self.stem}.safetensors.index{self.middle}.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _part(self, number: int) -> Path:
        return self.folder / f".part-{number}"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self.waiting, self._part(len(self.files)), metadata={"format": "pt"})
        self.files.append(list(self.waiting))
        self.waiting, self.size = {}, 0


def join(parts: Sequence[Path], out: Path) -> None:
    """One safetensors file of what several hold, without reading a tensor into memory.

    A file is eight bytes with the length of a JSON header, the header (name -> dtype, shape and
    the place of its bytes), and the bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, offset = [], 0
    for part in parts:
        with part.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            own = json.loads(file.read(length))
        own.pop("__metadata__", None)
        for name, entry in own.items():
            begin, end = entry["data_offsets"]
            header[name] = entry | {"data_offsets": [begin + offset, end + offset]}
        starts.append(8 + length)
        offset += part.stat().st_size - 8 - length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        for part, start in zip(parts, starts, strict=True):
            with part.open("rb") as file:
                file.seek(start)
                shutil.copyfileobj(file, target, 1 << 24)
