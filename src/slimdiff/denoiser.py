"""Which component of a pipeline is the denoiser, and which others can shrink."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from slimdiff.errors import SlimdiffError

NAMES = ("unet", "transformer")
"""What diffusers pipelines call their denoiser."""

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""What they call their text encoders."""


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """Name and module of a diffusers pipeline's denoiser; a compiled one is unwrapped.

    Raises:
        SlimdiffError: there is none; lists the components that were found.
    """
    for name in NAMES:
        module = _module(pipe, name)
        if module is not None:
            return name, module
    raise SlimdiffError(
        f"{type(pipe).__name__}: has no {' or '.join(NAMES)} (found: {_found(pipe)}); expected a "
        f"diffusers pipeline with a denoiser"
    )


@contextlib.contextmanager
def standing_in(pipe: Any, denoiser: nn.Module) -> Iterator[Any]:
    """The pipeline with `denoiser` in the place of its own, which it gets back afterwards."""
    name = denoiser_of(pipe)[0]
    own = getattr(pipe, name)
    setattr(pipe, name, denoiser)
    try:
        yield pipe
    finally:
        setattr(pipe, name, own)


def component_of(pipe: Any, name: str | None = None) -> tuple[str, nn.Module]:
    """Name and module of a component that can shrink: the denoiser, or a text encoder by name.

    Raises:
        SlimdiffError: the pipeline has none of that name; lists the components that were found.
    """
    if name is None:
        return denoiser_of(pipe)
    module = _module(pipe, name)
    if module is None or name not in (*NAMES, *ENCODERS):
        there = [own for own in (*NAMES, *ENCODERS) if _module(pipe, own) is not None]
        raise SlimdiffError(
            f"{type(pipe).__name__}: has no component {name!r} that can shrink; expected one of "
            f"{', '.join(there)}"
        )
    return name, module


def slim_components(pipe: Any) -> dict[str, nn.Module]:
    """The slim ones among the denoiser and the text encoders, by name."""
    found = {name: _module(pipe, name) for name in (*NAMES, *ENCODERS)}
    return {name: m for name, m in found.items() if m is not None and settings(m).get("slimdiff")}


def settings(module: nn.Module) -> dict[str, Any]:
    """A model's config, of diffusers or of transformers, as a dictionary; empty if it has none."""
    config: Any = getattr(module, "config", None) or {}
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def dense_class(module: nn.Module) -> str:
    """The name of a model's class, of a slim one that of its dense class."""
    name = type(module).__name__
    return name.removeprefix("Slim") if settings(module).get("slimdiff") else name


def _module(pipe: Any, name: str) -> nn.Module | None:
    module = getattr(pipe, name, None)
    module = getattr(module, "_orig_mod", module)
    return module if isinstance(module, nn.Module) else None


def _found(pipe: Any) -> str:
    return ", ".join(sorted(getattr(pipe, "components", {}))) or "no components"
