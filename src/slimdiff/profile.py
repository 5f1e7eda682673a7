"""The profile: how long each layer takes at each width on some machine; also as a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VERSION = 2


@dataclass(frozen=True)
class Profile:
    """Seconds of the denoiser and of its layers.

    Attributes:
        machine: what they were measured on: device, threads, dtype, shapes of the inputs.
        seconds: of one call of the dense denoiser.
        layers: layer path -> width -> seconds of the layer; the largest width is the dense one.
    """

    machine: dict[str, Any]
    seconds: float
    layers: dict[str, dict[int, float]]

    @property
    def dense_nanoseconds(self) -> int:
        """Of one call of the dense denoiser."""
        return round(1e9 * self.seconds)

    def of(self, layer: str, width: float) -> float:
        """Seconds of a layer at any width, interpolated between those that were timed."""
        times = self.layers[layer]
        widths = sorted(times)
        width = min(width, widths[-1])
        if width <= widths[0]:
            return times[widths[0]]
        right = next(i for i, w in enumerate(widths) if w >= width)
        a, b = widths[right - 1], widths[right]
        return times[a] + (times[b] - times[a]) * (width - a) / (b - a)

    def nanoseconds(self, layer: str, widths: Sequence[float]) -> list[int]:
        """Times at ascending widths, made strictly ascending: a narrower layer counts as no slower.

        A narrow width that is slower than a wide one costs what the wide one costs, less 1 ns for
        each step.
        """
        times = [round(1e9 * self.of(layer, width)) for width in widths]
        for i in range(len(times) - 2, -1, -1):
            times[i] = min(times[i], times[i + 1] - 1)
        return times


def digest(machine: Mapping[str, Any]) -> str:
    """A name for a machine."""
    return hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:12]


def read(path: Path | None, machine: Mapping[str, Any]) -> Profile | None:
    """A profile of this machine; what is damaged or of another version counts as none."""
    if path is None or not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION or data["machine"] != machine:
            return None
        layers = {
            layer: {int(width): float(s) for width, s in times.items()}
            for layer, times in data["layers"].items()
        }
        return Profile(data["machine"], float(data["seconds"]), layers)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def write(path: Path, found: Profile) -> None:
    """Replace the file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"version": VERSION, **asdict(found)}, indent=1) + "\n")
    partial.replace(path)
