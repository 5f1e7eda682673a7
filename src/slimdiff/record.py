"""Recording: hooks that hand activations to a recorder while a denoiser runs.

The hooks live inside the `with`; the statistics are the caller's.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from slimdiff.families import groups_of
from slimdiff.groups import Group
from slimdiff.probes import Probes
from slimdiff.recorder import Recorder
from slimdiff.statistics import Statistics


@contextlib.contextmanager
def record(
    denoiser: nn.Module,
    *,
    groups: Sequence[Group] | None = None,
    statistics: Statistics | None = None,
    seed: int = 0,
    num_probes: int = 16,
    tokens_per_sample: int = 256,
    dtype: torch.dtype = torch.float64,
) -> Iterator[Statistics]:
    """Record the statistics of `denoiser` while the caller runs it.

    Args:
        denoiser: any denoiser of a known family; it is not changed.
        groups: what to record for; all groups of the denoiser by default.
        statistics: adds to these instead of starting from nothing.
        seed: chooses token rows and probes.
        num_probes: inputs of the denoiser that are kept.
        tokens_per_sample: token rows per image and call that enter a statistic.
        dtype: of the sums.

    Raises:
        SlimdiffError: unknown denoiser; NaN or infinity in an activation (names the module).
    """
    with recording(
        denoiser, groups, statistics, seed, num_probes, tokens_per_sample, dtype
    ) as recorder:
        yield recorder.statistics


@contextlib.contextmanager
def recording(
    denoiser: nn.Module,
    groups: Sequence[Group] | None,
    statistics: Statistics | None,
    seed: int,
    num_probes: int,
    tokens_per_sample: int,
    dtype: torch.dtype,
) -> Iterator[Recorder]:
    """As `record`, but yields the recorder, whose `weight` a loop can set."""
    groups = groups_of(denoiser) if groups is None else groups
    if statistics is None:
        statistics = Statistics(type(denoiser).__name__, Probes(num_probes, seed))
    recorder = Recorder(statistics, seed=seed, tokens_per_sample=tokens_per_sample, dtype=dtype)
    handles = [
        denoiser.register_forward_pre_hook(_begin(recorder, denoiser), with_kwargs=True),
        denoiser.register_forward_hook(lambda *_: recorder.end_call()),
    ]
    try:
        for group in groups:
            handles.extend(HOOKS[group.kind](recorder, denoiser, group))
        for block in dict.fromkeys(group.block for group in groups):
            handles.append(_hook_block(recorder, denoiser, block))
        with torch.inference_mode():
            yield recorder
            recorder.flush()
    finally:
        for handle in handles:
            handle.remove()


def _begin(recorder: Recorder, denoiser: nn.Module) -> Callable[..., None]:
    signature = inspect.signature(denoiser.forward)

    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        recorder.begin_call(dict(signature.bind(*args, **kwargs).arguments))

    return hook


def _hook_query_key(recorder: Recorder, denoiser: nn.Module, group: Group) -> list[Any]:
    q, k = (denoiser.get_submodule(group.paths[role]) for role in ("q", "k"))
    return [
        q.register_forward_hook(
            lambda _m, _i, out: recorder.heads_moment(f"{group.layer}/q", out, group.heads)
        ),
        k.register_forward_hook(
            lambda _m, _i, out: recorder.keys(f"{group.layer}/k", out, group.heads)
        ),
    ]


def _hook_value_output(recorder: Recorder, denoiser: nn.Module, group: Group) -> list[Any]:
    v, out = (denoiser.get_submodule(group.paths[role]) for role in ("v", "out"))
    return [
        v.register_forward_hook(
            lambda _m, _i, out: recorder.heads_moment(f"{group.layer}/v", out, group.heads)
        ),
        out.register_forward_pre_hook(
            lambda _m, args: recorder.moment(f"{group.layer}/z", args[0])
        ),
        _hook_output(recorder, out, group),
    ]


def _hook_feed_forward(recorder: Recorder, denoiser: nn.Module, group: Group) -> list[Any]:
    down = denoiser.get_submodule(group.paths["down"])
    return [
        down.register_forward_pre_hook(
            lambda _m, args: recorder.moment(f"{group.layer}/h", args[0])
        ),
        _hook_output(recorder, down, group),
    ]


def _hook_resnet(recorder: Recorder, denoiser: nn.Module, group: Group) -> list[Any]:
    conv2 = denoiser.get_submodule(group.paths["conv2"])
    return [
        conv2.register_forward_pre_hook(
            lambda _m, args: recorder.lags(f"{group.layer}/lags", args[0])
        ),
        _hook_output(recorder, conv2, group),
    ]


def _hook_output(recorder: Recorder, layer: nn.Module, group: Group) -> Any:
    return layer.register_forward_hook(
        lambda _m, _i, out: recorder.output(f"{group.layer}/output_mean", out)
    )


HOOKS: dict[str, Callable[[Recorder, nn.Module, Group], list[Any]]] = {
    "query_key": _hook_query_key,
    "value_output": _hook_value_output,
    "feed_forward": _hook_feed_forward,
    "resnet": _hook_resnet,
}


def _hook_block(recorder: Recorder, denoiser: nn.Module, path: str) -> Any:
    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        y = output[0] if isinstance(output, tuple) else output
        recorder.influence(f"{path}/influence", x, y)

    return denoiser.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
