"""Statistics: weighted sums over tokens, added up while a denoiser runs.

Everything kept is a plain sum, so statistics of several runs, processes or machines add up to
those of one. Moments are uncentred, E[x x^T], unless their name says otherwise.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimdiff.digest import model_differences, refuse_other_weights
from slimdiff.errors import SlimdiffError
from slimdiff.probes import Probes
from slimdiff.statistics_file import SUM, VERSION, WEIGHTS_FILE, StoredSums, read_header

SUMMARY_FILE = "statistics.json"
SEEN_POINTS = 16
FEW = 16
"""Rows a channel up to which a moment is one of few samples."""

logger = logging.getLogger(__name__)


@dataclass
class Statistics:
    """Sums by name and what they were recorded from.

    A sum is named `<layer path>/<what>` and has a weight of its own, so that a mean is one
    division. `what` is, for an attention layer with h heads of width e and d = h e:
    `q`, `k`, `k_centred`, `v` (h, e, e), `z` (d, d), `z_magnitude` (d,); for a feed-forward layer
    of f hidden units: `h` (f, f), `h_magnitude` (f,); for a ResNet of c inner channels: `lags`
    (13, c, c), autocovariances of the second convolution's input; for all but queries and keys
    `output_mean` (o,), what the layer puts out; for a block: `influence` (1,).

    Attributes:
        denoiser: class name of the denoiser.
        sums: name -> weighted sum, float64 or float32.
        weights: name -> sum of the weights: tokens that entered, times their timestep weight.
        probes: inputs of the denoiser, kept to measure errors on; where prompts were held out, of
            these alone.
        seen: a few inputs that the sums are of, where prompts were held out, to tell how much less
            is lost there.
        held_out: whether the probes are of prompts that the sums are not of.
        calls: denoiser calls seen.
        batches: calibration batches finished.
        source: what identifies the run that is being resumed (prompts, configuration).
    """

    denoiser: str
    probes: Probes
    sums: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    calls: int = 0
    batches: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    seen: Probes = field(default_factory=lambda: Probes(SEEN_POINTS))
    held_out: bool = False

    def add(self, name: str, total: Tensor, weight: float, factor: float = 1.0) -> None:
        """Add `factor` times a sum, and its weight, to what `name` holds."""
        if name not in self.sums:
            self.sums[name] = torch.zeros_like(total)
        self.sums[name].add_(total, alpha=factor)
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def add_gram(self, name: str, x_ne: Tensor, weight: float, dtype: torch.dtype) -> None:
        """Add `weight` times x^T x, (e, e), of x (n, e), or a matrix for each of x (h, n, e).

        Sums are of `dtype`. The products of one call are float32 (float64 of float64 rows): their
        relative rounding is at most n * 6e-8. On a CPU those of the first `FEW` rows a channel are
        of `dtype`: rounding shows in directions that few rows hold, and averages out over many.
        """
        rows, width = x_ne.shape[-2:]
        few = x_ne.device.type == "cpu" and self.weights.get(name, 0.0) < FEW * width
        if few or x_ne.dtype not in (torch.float32, torch.float64):
            x_ne = x_ne.to(torch.promote_types(x_ne.dtype, dtype) if few else torch.float32)
        if name not in self.sums:
            shape = (*x_ne.shape[:-2], width, width)
            self.sums[name] = torch.zeros(shape, dtype=dtype, device=x_ne.device)
        total = self.sums[name]
        if total.dtype == x_ne.dtype:
            add_product = total.addmm_ if x_ne.ndim == 2 else total.baddbmm_
            add_product(x_ne.mT, x_ne, alpha=weight)
        else:
            product = torch.mm if x_ne.ndim == 2 else torch.bmm
            total.add_(product(x_ne.mT, x_ne), alpha=weight)
        self.weights[name] = self.weights.get(name, 0.0) + weight * rows

    def mean(self, name: str) -> Tensor:
        """The mean of `name` in float64.

        Raises:
            SlimdiffError: nothing was recorded under that name.
        """
        if not self.weights.get(name):
            raise SlimdiffError(
                f"{name}: no tokens were recorded; run the denoiser inside slimdiff.record(), or "
                f"calibrate with at least one prompt"
            )
        return self.sums[name].to(torch.float64, copy=True).div_(self.weights[name])

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse statistics of another model.

        Raises:
            SlimdiffError: `name` is missing or has another shape.
        """
        found = tuple(self.sums[name].shape) if name in self.sums else None
        if found != shape:
            raise SlimdiffError(
                f"{name}: statistics have shape {found}, the denoiser needs {shape}; were they "
                f"recorded from another model, or was it changed since? Calibrate again"
            )

    def save(self, folder: str | Path) -> None:
        """Write `statistics.safetensors` (complete, replaced atomically) and a JSON summary."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        header = {"slimdiff": json.dumps(self._header())}
        partial = folder / f".{WEIGHTS_FILE}.{os.getpid()}"
        save_file(self._tensors(), partial, metadata=header)
        partial.replace(folder / WEIGHTS_FILE)
        summary = self._header() | {"shapes": {n: list(s.shape) for n, s in self.sums.items()}}
        partial = folder / f".{SUMMARY_FILE}.{os.getpid()}"
        partial.write_text(json.dumps(summary, indent=1) + "\n")
        partial.replace(folder / SUMMARY_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            SlimdiffError: the file is missing, damaged or of a newer version.
        """
        from safetensors import safe_open

        path = Path(folder) / WEIGHTS_FILE
        header = read_header(path)
        with safe_open(path, framework="pt") as file:
            # Copies are aligned as fresh tensors are, so that sums go on bit for bit.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        return cls._from(header, tensors)

    @classmethod
    def open(cls, folder: str | Path) -> Statistics:
        """As `load`, but each sum is read when it is asked for, and none can be added to.

        Raises:
            SlimdiffError: the file is missing, damaged or of a newer version.
        """
        from safetensors import safe_open

        path = Path(folder) / WEIGHTS_FILE
        header = read_header(path)
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not name.startswith(SUM)]
            statistics = cls._from(header, {name: file.get_tensor(name).clone() for name in names})
        statistics.sums = StoredSums(path)  # type: ignore[assignment]  # read like a dict
        return statistics

    @classmethod
    def merge(cls, parts: Iterable[Statistics]) -> Statistics:
        """The statistics of all parts together; sources are kept as a list.

        Parts that were sampled in different ways add up too, with a warning.

        Raises:
            SlimdiffError: no part, or parts of different denoisers or of other weights.
        """
        parts = list(parts)
        if not parts:
            raise SlimdiffError("nothing to merge: give at least one statistics folder")
        first = parts[0]
        refuse_other_weights([part.source for part in parts])
        probes = Probes(max(part.probes.capacity for part in parts), first.probes.seed)
        merged = cls(first.denoiser, probes, source={"merged": [part.source for part in parts]})
        for part in parts:
            if part.denoiser != first.denoiser:
                raise SlimdiffError(
                    f"statistics of {part.denoiser} and {first.denoiser} do not add up"
                )
            for name, total in part.sums.items():
                if name in merged.sums:
                    merged.check(name, tuple(total.shape))
                merged.add(name, total, part.weights[name])
            merged.calls += part.calls
            merged.batches += part.batches
        probes.merge(part.probes for part in parts)
        merged.seen.merge(part.seen for part in parts)
        merged.held_out = all(part.held_out for part in parts)
        _warn_of_other_sampling(parts)
        return merged

    def _header(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "denoiser": self.denoiser,
            "calls": self.calls,
            "batches": self.batches,
            "source": self.source,
            "weights": self.weights,
            "probes": self.probes.described(),
            "seen": self.seen.described(),
            "held_out": self.held_out,
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"{SUM}{name}": total.contiguous() for name, total in self.sums.items()}
        for name in ("probes", "seen"):
            for key, probe in getattr(self, name).rows.items():
                own = {f"{name}/{key}/{p}": t.contiguous() for p, t in probe.tensors.items()}
                tensors |= own
        return tensors

    @classmethod
    def _from(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Statistics:
        probes, seen = (Probes.restored(header[name], name, tensors) for name in ("probes", "seen"))
        sums = {n.removeprefix(SUM): t for n, t in tensors.items() if n.startswith(SUM)}
        return cls(
            denoiser=header["denoiser"],
            probes=probes,
            sums=sums,
            weights=header["weights"],
            calls=header["calls"],
            batches=header["batches"],
            source=header["source"],
            seen=seen,
            held_out=header["held_out"],
        )


def _warn_of_other_sampling(parts: Iterable[Statistics]) -> None:
    configs = [part.source.get("config", {}) for part in parts]
    names = sorted({name for config in configs for name in config} - {"seed", "batch_size"})
    differ = [name for name in names if len({str(config.get(name)) for config in configs}) > 1]
    differ += model_differences([part.source for part in parts])
    if differ:
        logger.warning("the merged statistics were sampled with different %s", ", ".join(differ))
