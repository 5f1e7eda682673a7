"""Chance: the global generators, seeded for a while and then as they were before."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Have the global generators of torch (CPU and accelerators), numpy and Python begin at `seed`.

    Some schedulers (DPM++ SDE) draw from them, whatever generator a pipeline is given. Afterwards
    they go on from where they were.
    """
    generators = _generators()
    states = [(generator, generator.get_state()) for generator in generators]
    python, numpy = random.getstate(), sys.modules.get("numpy")
    kept: Any = None if numpy is None else numpy.random.get_state()
    try:
        for generator in generators:
            generator.manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(kept)


def _generators() -> list[torch.Generator]:
    """Torch's global generators, of accelerators that are in use."""
    found = [torch.default_generator]
    for name in ("cuda", "xpu"):
        module: Any = getattr(torch, name, None)
        if module is not None and module.is_initialized():
            found += module.default_generators
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return found
