"""Error curves on disk, beside the statistics they came from: another budget measures nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.checksums import tensors_digest, weights_digest
from slimdiff.config import Recipe
from slimdiff.curves import ErrorCurve
from slimdiff.statistics import Statistics

VERSION = 7


class CurveFile:
    """The curves of one recipe under one set of statistics.

    A file of other statistics, of other weights, of another recipe or that is damaged counts as
    none: curves can always be measured again.
    """

    def __init__(
        self,
        folder: str | Path,
        statistics: Statistics,
        recipe: Recipe,
        *,
        probed: bool,
        denoiser: nn.Module,
    ) -> None:
        """`denoiser` is what was recorded; its weights, too, tell a file from others."""
        kind = "probed" if probed else "decomposed"
        self.path = Path(folder) / f"curves-{recipe.name}-{kind}.safetensors"
        names = sorted(statistics.sums)
        # Where nothing says how statistics came about, their numbers do.
        made = statistics.source or tensors_digest(statistics.sums)
        origin = [
            VERSION,
            made,
            weights_digest(denoiser),
            statistics.calls,
            names,
            asdict(recipe),
            probed,
        ]
        text = json.dumps(origin, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()

    def load(self) -> dict[str, ErrorCurve]:
        """Group name -> curve, for the groups that were measured."""
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            return {}
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("slimdiff", "{}"))
                if header.get("key") != self.key:
                    return {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, ValueError):
            return {}
        return {name: _curve(name, header, tensors) for name in header["gains"]}

    def save(self, curves: Mapping[str, ErrorCurve]) -> None:
        """Replace the file by these curves, atomically."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, curve in curves.items():
            tensors[f"errors/{name}"] = curve.errors.contiguous()
            if curve.order is not None:
                tensors[f"order/{name}"] = curve.order.cpu().to(torch.int32)
            for heads, errors in (curve.by_heads or {}).items():
                tensors[f"errors of {heads} heads/{name}"] = errors.contiguous()
        gains: dict[str, Any] = {name: curve.gains for name, curve in curves.items()}
        removed = {name: curve.removed for name, curve in curves.items()}
        measured = {"key": self.key, "gains": gains, "removed": removed}
        measured["heads"] = {
            name: None if curve.by_heads is None else list(curve.by_heads)
            for name, curve in curves.items()
        }
        header = {"slimdiff": json.dumps(measured)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        save_file(tensors, partial, metadata=header)
        partial.replace(self.path)


def _curve(name: str, measured: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ErrorCurve:
    order, gains = tensors.get(f"order/{name}"), measured["gains"][name]
    by_width = None if gains is None else {int(width): gain for width, gain in gains.items()}
    order = None if order is None else order.long()
    heads = measured["heads"][name]
    by_heads = None if heads is None else {n: tensors[f"errors of {n} heads/{name}"] for n in heads}
    removed = measured["removed"][name]
    return ErrorCurve(tensors[f"errors/{name}"], by_width, order, removed, by_heads)
