"""Healing on disk: one safetensors file, replaced whole, from which an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

VERSION = 1


@dataclass
class Progress:
    """How far healing is.

    Attributes:
        before: error before it.
        history: (step, error) of the start and after each round.
        round: rounds done.
        step: optimizer steps made.
        seconds: time spent, over all runs.
        best: smallest error so far.
        flat: rounds since it last fell.
        precision: of forward and backward passes.
        stopped: why it ended; empty while it has not.
    """

    before: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)
    round: int = 0
    step: int = 0
    seconds: float = 0.0
    best: float = 0.0
    flat: int = 0
    precision: str = "float32"
    stopped: str = ""


class HealFile:
    """The file of one way to heal: another way, or another model, has another name."""

    def __init__(self, folder: str | Path, origin: Mapping[str, Any]) -> None:
        text = json.dumps([VERSION, origin], sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.path = Path(folder) / f"heal-{digest[:12]}.safetensors"

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Replace the file, atomically."""
        from safetensors.torch import save_file

        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        header = {"slimdiff": json.dumps(vars(progress))}
        save_file({k: t.contiguous() for k, t in tensors.items()}, partial, metadata=header)
        partial.replace(self.path)

    def load(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """What `save` wrote; None if there is no file, or a damaged one."""
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                found = json.loads((file.metadata() or {})["slimdiff"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, ValueError, KeyError):
            return None
        found["history"] = [tuple(pair) for pair in found["history"]]
        return Progress(**found), tensors
