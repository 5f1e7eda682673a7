"""The profile: how long each layer takes at each width on some machine; also as a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VERSION = 4


@dataclass(frozen=True)
class Profile:
    """Seconds of the denoiser and of its layers.

    Attributes:
        machine: what they were measured on: device, threads, dtype, shapes of the inputs.
        seconds: of one call of the dense denoiser.
        layers: layer path -> width -> seconds of the layer; the largest width is the dense one.
        fixed: layer path -> seconds that stay however few heads there are, for the attention layers
            where some may go.
        fused: upsampler -> seconds of the dense call that fusing it spares, where it does; the
            times of its convolution are then of the fused upsampler.
    """

    machine: dict[str, Any]
    seconds: float
    layers: dict[str, dict[int, float]]
    fixed: dict[str, float] = field(default_factory=dict)
    fused: dict[str, float] = field(default_factory=dict)

    @property
    def dense_nanoseconds(self) -> int:
        """Of one call of the dense denoiser."""
        return round(1e9 * self.seconds)

    @property
    def remaining_nanoseconds(self) -> int:
        """Of one call while nothing shrinks, with upsamplers fused."""
        return round(1e9 * (self.seconds - sum(self.fused.values())))

    def of(self, layer: str, width: int, share: float = 1.0) -> float:
        """Seconds of a layer at any width, interpolated between those that were timed.

        A narrower layer counts as no slower: where one was, it takes what the wider one does.

        Args:
            layer: its path.
            width: channels per head, hidden units, channels or rank.
            share: of the heads; time falls with them, in a straight line, to what is fixed.
        """
        times = self.layers[layer]
        widths = sorted(times)
        width = min(max(width, widths[0]), widths[-1])
        right = next(i for i, w in enumerate(widths) if w >= width)
        seconds = least = min(times[w] for w in widths[right:])
        if widths[right] > width:
            a, b = widths[right - 1], widths[right]
            seconds += (min(times[a], least) - least) * (b - width) / (b - a)
        fixed = min(self.fixed.get(layer, seconds), seconds)
        return fixed + share * (seconds - fixed)


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
        more = ({path: float(s) for path, s in data[name].items()} for name in ("fixed", "fused"))
        return Profile(data["machine"], float(data["seconds"]), layers, *more)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def write(path: Path, found: Profile) -> None:
    """Replace the file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"version": VERSION, **asdict(found)}, indent=1) + "\n")
    partial.replace(path)
