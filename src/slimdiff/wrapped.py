"""What may stand over a denoiser: caches, patches and hooks of other libraries.

A layer is slimmed by what it sees, and by what the denoiser puts out when the layer changes: every
call has to be a function of its inputs and of the weights alone. Under a cache a call puts out what
an earlier one did; token merging and FreeU are another function than the weights are; weights that
were offloaded or cast are elsewhere, or others, while a layer does not run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

from slimdiff.errors import SlimdiffError

CACHES = {
    "fbc_": "a first-block cache",
    "faster_cache": "FasterCache",
    "mag_cache": "MagCache",
    "pyramid_attention_broadcast": "pyramid attention broadcast",
    "taylorseer_cache": "TaylorSeer",
    "sea_cache": "SeaCache",
    "text_kv_cache": "a cache of text keys and values",
}
"""What the names of diffusers' cache hooks begin with."""

DISABLE = "call the denoiser's disable_cache() (and its enable_cache() when it is slim)"
NO_CASTING = "load the model again without enable_layerwise_casting()"
NO_OFFLOADING = "load the pipeline again without enable_group_offload()"
NO_ACCELERATE = "call pipe.remove_all_hooks(), then move the pipeline to one device"

OTHERS = {
    "layer_skip_hook": ("a guider that skips layers", "call its cleanup_models(denoiser)"),
    "smoothed_energy_guidance": ("smoothed energy guidance", "call its cleanup_models(denoiser)"),
    "layerwise_casting": ("layerwise casting", NO_CASTING),
    "group_offloading": ("group offloading", NO_OFFLOADING),
    "lazy_prefetch_group_offloading": ("group offloading", NO_OFFLOADING),
    "cp_input": ("context parallelism", "load the model again without enable_parallelism()"),
    "cp_output": ("context parallelism", "load the model again without enable_parallelism()"),
}
"""What the names of its other hooks begin with, and how to be rid of them."""

PACKAGES = {
    "DeepCache": ("DeepCache", "call helper.disable(), or load the model again"),
    "tomesd": ("token merging (tomesd)", "call tomesd.remove_patch(pipe)"),
    "cache_dit": (
        "cache-dit",
        "call cache_dit.disable_cache(pipe), or load the pipeline again if forwards stay",
    ),
    "para_attn": ("ParaAttention", "load the pipeline again without its adapters"),
    "tgate": ("T-GATE", "load the pipeline again without it"),
    "hidiffusion": ("HiDiffusion", "call hidiffusion.remove_hidiffusion(pipe)"),
}
"""Packages that put classes or forwards of their own over those of diffusers."""

MOVING = {"AlignDevicesHook", "CpuOffload", "CustomOffloadHook"}
"""Hooks of accelerate that move weights, or inputs to them."""

FREEU = ("s1", "s2", "b1", "b2")

Found = tuple[str, str, str]
"""Module path, what stands over it, and how to be rid of it."""


def refuse_wrapped(denoiser: nn.Module) -> None:
    """Refuse a denoiser that is no function of its inputs and weights.

    A hook that moves the whole denoiser to a device and back may stay: calls are what they were.

    Raises:
        SlimdiffError: names the module, what stands over it, and how to be rid of it.
    """
    for path, what, fix in _found(denoiser):
        raise SlimdiffError(
            f"{path or type(denoiser).__name__}: {what} is on, but a denoiser is slimmed as it is "
            f"without; to go on, {fix}"
        )


def refuse_offloaded(denoiser: nn.Module) -> None:
    """As `refuse_wrapped`, and no hook may move weights or inputs: while widths are chosen, layers
    run with other weights than their own, or without any.

    Raises:
        SlimdiffError: as said.
    """
    refuse_wrapped(denoiser)
    for path, hook in _accelerate_hooks(denoiser):
        if MOVING & {base.__name__ for base in type(hook).__mro__}:
            raise SlimdiffError(
                f"{path or type(denoiser).__name__}: offloading is on, or weights are spread over "
                f"devices ({_name(hook)}), but layers are measured with other weights than their "
                f"own, which hooks must not move; to go on, {NO_ACCELERATE}"
            )


def refuse_replaced(denoiser: nn.Module) -> None:
    """As `refuse_offloaded`, for what copies the denoiser: no forward may be replaced.

    A copy of a module whose forward is another function runs what that function holds: the layers
    of the original.

    Raises:
        SlimdiffError: names the module and the function.
    """
    refuse_offloaded(denoiser)
    for path, module in denoiser.named_modules():
        if (forward := replaced_forward(module)) is not None:
            raise SlimdiffError(
                f"{path or type(denoiser).__name__}: {described(forward)}, and a copy would run "
                f"the layers of the original; `del module.forward` first, and replace it again "
                f"on the slim model"
            )


def replaced_forward(module: nn.Module) -> Any:
    """The forward that stands on a module in place of its class's; None where there is none.

    What accelerate puts there calls the class's all the same, and so does what is left where hooks
    were removed: the class's own forward, bound to the module.
    """
    forward = vars(module).get("forward")
    if forward is None or "_hf_hook" in vars(module) or is_own_forward(module, forward):
        return None
    return forward


def is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Whether it is the forward of the module's class, or of a base class, bound to the module."""
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return False
    return any(forward.__func__ is vars(base).get("forward") for base in type(module).__mro__)


def described(forward: Any) -> str:
    """Which function a forward was replaced by, as part of a sentence."""
    function = _function(forward)
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"its forward was replaced by {name} of {_module_of(forward) or 'an unknown module'}"


def _found(denoiser: nn.Module) -> Iterator[Found]:
    cached = getattr(denoiser, "_cache_config", None) is not None
    if getattr(denoiser, "enable_teacache", False):
        yield "", "TeaCache", "set enable_teacache of its class to False and give it its forward"
    for path, module in denoiser.named_modules():
        for name, hook in _diffusers_hooks(module):
            yield from _of_hook(path, name, hook, cached)
        if all(_is_on(vars(module).get(name)) for name in FREEU):
            yield path, "FreeU", "call disable_freeu() of the UNet or the pipeline"
        yield from _of_package(path, module)
    for path, hook in _accelerate_hooks(denoiser):
        if type(hook).__name__ == "LayerwiseCastingHook":
            yield path, "layerwise casting", NO_CASTING
        elif getattr(hook, "offload", False) is True:
            yield path, f"offloading of single layers ({_name(hook)})", NO_ACCELERATE
    if cached:
        name = type(denoiser._cache_config).__name__
        yield "", f"a cache ({name})", DISABLE


def _of_hook(path: str, name: str, hook: Any, cached: bool) -> Iterator[Found]:
    remove = (
        f"call diffusers.hooks.HookRegistry.check_if_exists_or_initialize(denoiser)"
        f'.remove_hook("{name}", recurse=True)'
    )
    for start, what in CACHES.items():
        if name.startswith(start):
            yield path, f"{what} ({name})", DISABLE if cached else remove
            return
    for start, (what, fix) in OTHERS.items():
        if name.startswith(start):
            yield path, f"{what} ({name})", fix
            return
    if getattr(hook, "_is_stateful", False):
        yield path, f"a hook that remembers calls ({name}, {_name(hook)})", remove


def _of_package(path: str, module: nn.Module) -> Iterator[Found]:
    """What packages put there: a class of theirs, or a forward."""
    own: list[str | None] = [base.__module__ for base in type(module).__mro__]
    own += [_module_of(vars(module).get("forward")), _module_of(type(module).forward)]
    for package in {str(name).split(".")[0] for name in own} & set(PACKAGES):
        yield path, *PACKAGES[package]
        return
    if type(module).__name__ == "ToMeBlock":
        yield path, "token merging (ToMeBlock)", "give the blocks their own classes"


def _diffusers_hooks(module: nn.Module) -> list[tuple[str, Any]]:
    return list(getattr(vars(module).get("_diffusers_hook"), "hooks", {}).items())


def _accelerate_hooks(denoiser: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in denoiser.named_modules():
        hook = vars(module).get("_hf_hook")
        for part in getattr(hook, "hooks", [hook]) if hook is not None else ():
            yield path, part


def _function(forward: Any) -> Any:
    while isinstance(forward, functools.partial):
        forward = forward.func
    return getattr(forward, "__func__", forward)


def _module_of(forward: Any) -> str | None:
    """Where a function was written, whatever it pretends to wrap."""
    names = getattr(_function(forward), "__globals__", {})
    return names.get("__name__")


def _is_on(factor: Any) -> bool:
    return isinstance(factor, int | float) and bool(factor)


def _name(hook: Any) -> str:
    return type(hook).__name__
