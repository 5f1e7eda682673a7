"""Which component of a pipeline is the denoiser."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimdiff.errors import SlimdiffError

NAMES = ("unet", "transformer")
"""What diffusers pipelines call their denoiser."""


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """Name and module of a diffusers pipeline's denoiser; a compiled one is unwrapped.

    Raises:
        SlimdiffError: there is none; lists the components that were found.
    """
    for name in NAMES:
        module = getattr(pipe, name, None)
        module = getattr(module, "_orig_mod", module)
        if isinstance(module, nn.Module):
            return name, module
    found = ", ".join(sorted(getattr(pipe, "components", {}))) or "no components"
    raise SlimdiffError(
        f"{type(pipe).__name__}: has no {' or '.join(NAMES)} (found: {found}); expected a "
        f"diffusers pipeline with a denoiser"
    )
