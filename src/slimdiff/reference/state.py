"""Atomic checkpoints of training: one safetensors file, counters in its header."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass
class Progress:
    """How far training is."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0


def save_state(path: Path, tensors: Mapping[str, Tensor], progress: Progress) -> None:
    """Replace the checkpoint at `path`, or leave the old one whole."""
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    header = {key: str(value) for key, value in vars(progress).items()}
    save_file({k: t.contiguous() for k, t in tensors.items()}, partial, metadata=header)
    os.replace(partial, path)


def load_state(path: Path) -> tuple[dict[str, Tensor], Progress]:
    """What `save_state` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    progress = Progress(int(header["step"]), int(header["samples"]), float(header["seconds"]))
    return tensors, progress


def averages(state: Mapping[str, Tensor], network: str) -> dict[str, Tensor]:
    """The averaged weights of one network, by its own names."""
    prefix = f"average/{network}."
    return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
