"""Forwards that stand in for those of modules for a while, and what a change of classes asks of
forwards that stay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any

from torch import nn

from slimdiff.errors import SlimdiffError
from slimdiff.wrapped import described, is_own_forward, replaced_forward

Forward = Callable[..., Any]

CHANGING = ("constants", "factored", "attentions", "fused_upsamplers")
"""Parts of a slim config that name modules whose class changes."""


@contextlib.contextmanager
def replacing(
    modules: Mapping[str, nn.Module], make: Callable[[str, Forward], Forward]
) -> Iterator[None]:
    """Replace the forwards of modules inside; each gets back what it had: its class's, or another
    that stood there, such as an offloading hook's.

    Args:
        modules: by path.
        make: called with path and forward of each; returns what stands in.
    """
    before = [(module, vars(module).get("forward")) for module in modules.values()]
    try:
        for path, module in modules.items():
            vars(module)["forward"] = make(path, module.forward)
        yield
    finally:
        for module, own in before:
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own


def refuse_hidden(denoiser: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuse replaced forwards on modules whose class changes: they would hide the new one's.

    Args:
        denoiser: as it is before.
        config: what it is to become, as `shapes.slim_config` makes it.

    Raises:
        SlimdiffError: names the module and the function.
    """
    paths = [path for part in CHANGING for path in config.get(part, {})]
    fused = [f"{path}.conv" for path in config.get("fused_upsamplers", {})]
    for path in ["", *paths, *fused]:
        if (forward := replaced_forward(denoiser.get_submodule(path))) is not None:
            raise SlimdiffError(
                f"{path or type(denoiser).__name__}: {described(forward)}, but slimming gives the "
                f"layer another; `del module.forward` first, and replace it again on the slim model"
            )


def let_classes_speak_(model: nn.Module) -> None:
    """Have modules run the forward of the class that they have by now.

    Where hooks were removed, the forward of the class that a module had is left on it, bound to it;
    accelerate's hooks hold one.
    """
    for module in model.modules():
        if is_own_forward(module, vars(module).get("forward")):
            del vars(module)["forward"]
        if is_own_forward(module, vars(module).get("_old_forward")):
            vars(module)["_old_forward"] = MethodType(type(module).forward, module)
