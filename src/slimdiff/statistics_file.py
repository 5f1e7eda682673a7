"""The file of statistics: its header, and sums that are read when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from slimdiff.errors import SlimdiffError

VERSION = 2
WEIGHTS_FILE = "statistics.safetensors"
SUM = "sum/"
"""Begins the names of sums in the file."""


class StoredSums(Mapping[str, Tensor]):
    """The sums in a statistics file; every look-up reads one."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(SUM)]
        self.names = dict.fromkeys(name.removeprefix(SUM) for name in names)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        if name not in self.names:
            raise KeyError(name)
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(f"{SUM}{name}")
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a statistics file.

    Raises:
        SlimdiffError: the file is missing, damaged or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise SlimdiffError(f"{path}: no such file; expected a folder that calibration wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {}).get("slimdiff", "{}"))
    except SafetensorError as error:
        raise SlimdiffError(f"{path}: damaged ({error}); delete it, calibrate again") from error
    version = header.get("version")
    if version != VERSION:
        raise SlimdiffError(
            f"{path}: statistics version {version}, this slimdiff reads {VERSION}; "
            f"upgrade slimdiff or calibrate again"
        )
    return header
