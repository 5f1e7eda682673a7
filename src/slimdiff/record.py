"""Recording: hooks that hand activations to a recorder while a denoiser runs.

The hooks live inside the `with`; the statistics are the caller's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.calls import bound, signature_of
from slimdiff.executed import Executed
from slimdiff.families import groups_of
from slimdiff.groups import OUTPUTS, SECOND_STREAM, Group
from slimdiff.padding import Padding
from slimdiff.probes import Probes
from slimdiff.recorder import Recorder
from slimdiff.removal import mean_name, why_it_stays
from slimdiff.statistics import Statistics
from slimdiff.streams import counting_of, on_outputs
from slimdiff.wrapped import refuse_wrapped


@contextlib.contextmanager
def record(
    denoiser: nn.Module,
    *,
    groups: Sequence[Group] | None = None,
    statistics: Statistics | None = None,
    seed: int = 0,
    num_probes: int = 32,
    tokens_per_sample: int = 64,
    dtype: torch.dtype = torch.float64,
    held_out: bool = False,
) -> Iterator[Statistics]:
    """Record the statistics of `denoiser` while the caller runs it.

    What is lost on inputs that the moments are of is less than on others. To measure the latter,
    run a few inputs apart from the rest:

        with slimdiff.record(denoiser, held_out=True) as statistics: ...  # a tenth of the inputs
        with slimdiff.record(denoiser, statistics=statistics): ...        # the others

    Args:
        denoiser: any denoiser or text encoder of a known family; it is not changed. Where it is
            given a mask of its text, padding that it does not look at does not count.
        groups: what to record for; all groups of the denoiser by default.
        statistics: adds to these instead of starting from nothing.
        seed: chooses token rows and probes.
        num_probes: points of trajectories whose inputs are kept, with guidance both halves of each:
            half to measure gains, half to judge by.
        tokens_per_sample: token rows per image and call that enter a statistic.
        dtype: of the sums.
        held_out: keep inputs only, no moments; later recordings into the same statistics then keep
            none but a few to compare with.

    Raises:
        SlimdiffError: unknown denoiser; NaN or infinity in an activation (names the module);
            something stands over the denoiser (a cache, FreeU, offloading of single layers), or
            skips layers in some of its calls.
    """
    with recording(
        denoiser,
        groups,
        statistics,
        seed,
        num_probes,
        tokens_per_sample,
        dtype,
        held_out=held_out,
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
    *,
    held_out: bool = False,
) -> Iterator[Recorder]:
    """As `record`, but yields the recorder, whose `weight` a loop can set."""
    refuse_wrapped(denoiser)
    groups = groups_of(denoiser) if groups is None else groups
    if statistics is None:
        statistics = Statistics(type(denoiser).__name__, Probes(num_probes, seed))
    recorder = Recorder(statistics, seed=seed, tokens_per_sample=tokens_per_sample, dtype=dtype)
    recorder.reservoir = _reservoir(statistics, held_out)
    executed, recorder.padding = Executed(denoiser, groups), Padding(denoiser, groups)
    handles: list[Any] = executed.handles + recorder.padding.handles
    try:
        begin = _begin(recorder, denoiser, executed)
        handles.append(denoiser.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(denoiser.register_forward_hook(lambda *_: executed.end()))
        if not held_out:
            handles.extend(_hook_layers(recorder, denoiser, groups))
        with torch.inference_mode():
            yield recorder
            recorder.flush()
    finally:
        for handle in handles:
            handle.remove()


def _reservoir(statistics: Statistics, held_out: bool) -> Probes:
    """Where inputs are kept: among the probes, unless those are of inputs that were held out."""
    if held_out:
        statistics.held_out = True
    return statistics.seen if statistics.held_out and not held_out else statistics.probes


def _hook_layers(recorder: Recorder, denoiser: nn.Module, groups: Sequence[Group]) -> list[Any]:
    handles: list[Any] = [denoiser.register_forward_hook(lambda *_: recorder.end_call())]
    for group in _sources(groups):
        handles.extend(HOOKS[group.kind](recorder, denoiser, group))
    for block, output in {group.block: group.output for group in groups}.items():
        handles.append(_hook_block(recorder, denoiser, block, output))
    return handles


def _sources(groups: Sequence[Group]) -> list[Group]:
    """The groups without those whose statistics another one's are."""
    first = {(group.kind, group.source or group.name): group for group in reversed(groups)}
    return [group for group in groups if first[group.kind, group.source or group.name] is group]


def _begin(recorder: Recorder, denoiser: nn.Module, executed: Executed) -> Callable[..., None]:
    signature = signature_of(denoiser)

    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        arguments = bound(signature, args, kwargs)
        executed.begin(arguments)
        recorder.begin_call(arguments)

    return hook


def _hook_query_key(recorder: Recorder, denoiser: nn.Module, group: Group) -> list[Any]:
    def add_queries(q_bti: Tensor) -> None:
        recorder.heads_moment(f"{group.layer}/q", q_bti, group.heads)

    def add_keys(k_bti: Tensor) -> None:
        recorder.keys(f"{group.layer}/k", k_bti, group.heads)

    queries, keys = (group.streams(kind) for kind in ("q", "k"))
    if getattr(denoiser.get_submodule(group.layer), SECOND_STREAM["out"], None) is None:
        queries = queries[:1]  # what the second stream asks is thrown away
    return [
        *on_outputs(recorder, denoiser, group, queries, add_queries),
        *on_outputs(recorder, denoiser, group, keys, add_keys),
    ]


def _hook_value_output(recorder: Recorder, denoiser: nn.Module, group: Group) -> list[Any]:
    def add_values(v_bti: Tensor) -> None:
        recorder.heads_moment(f"{group.layer}/v", v_bti, group.heads)

    return [
        *on_outputs(recorder, denoiser, group, group.streams("v"), add_values),
        *(_on_input(recorder, denoiser, group, role, "z") for role in group.streams("out")),
        *_on_mean(recorder, denoiser, group),
    ]


def _hook_feed_forward(recorder: Recorder, denoiser: nn.Module, group: Group) -> list[Any]:
    return [
        _on_input(recorder, denoiser, group, "down", "h"),
        *_on_mean(recorder, denoiser, group),
    ]


def _on_input(recorder: Recorder, denoiser: nn.Module, group: Group, role: str, what: str) -> Any:
    """Add the moment of what goes into a role's layer: the group's columns of it."""
    columns = group.input_columns(role)

    def hook(_module: nn.Module, args: tuple) -> None:
        x_bti = args[0].flatten(2).mT if args[0].ndim == 4 else args[0]
        with recorder.only(counting_of(recorder, group, role, x_bti)):
            recorder.moment(f"{group.layer}/{what}", x_bti[..., columns])

    return denoiser.get_submodule(group.paths[role]).register_forward_pre_hook(hook)


def _on_mean(recorder: Recorder, denoiser: nn.Module, group: Group) -> list[Any]:
    """Add what the group's layer puts out, if its mean can stand in for it."""
    if why_it_stays(denoiser, group) is not None:
        return []
    role = OUTPUTS[group.kind]

    def hook(_module: nn.Module, _args: tuple, y: Tensor) -> None:
        with recorder.only(counting_of(recorder, group, role, y)):
            recorder.output(mean_name(group), y)

    return [denoiser.get_submodule(group.paths[role]).register_forward_hook(hook)]


def _hook_resnet(recorder: Recorder, denoiser: nn.Module, group: Group) -> list[Any]:
    conv2 = denoiser.get_submodule(group.paths["conv2"])
    return [
        conv2.register_forward_pre_hook(
            lambda _m, args: recorder.lags(f"{group.layer}/lags", args[0])
        ),
        *_on_mean(recorder, denoiser, group),
    ]


def _hook_modulation(recorder: Recorder, denoiser: nn.Module, group: Group) -> list[Any]:
    def hook(_module: nn.Module, args: tuple) -> None:
        x = args[0]  # one vector per image, or one per token
        recorder.moment(f"{group.source or group.layer}/x", x if x.ndim == 3 else x.unsqueeze(1))

    return [denoiser.get_submodule(group.layer).register_forward_pre_hook(hook)]


def _hook_projection(recorder: Recorder, denoiser: nn.Module, group: Group) -> list[Any]:
    def hook(module: nn.Module, _args: tuple, y: Tensor) -> None:
        y_bto = y.flatten(2).mT if y.ndim == 4 else y
        own: Any = module.bias
        recorder.moment(f"{group.layer}/y", y_bto if own is None else y_bto - own)

    return [denoiser.get_submodule(group.layer).register_forward_hook(hook)]


HOOKS: dict[str, Callable[[Recorder, nn.Module, Group], list[Any]]] = {
    "query_key": _hook_query_key,
    "value_output": _hook_value_output,
    "feed_forward": _hook_feed_forward,
    "resnet": _hook_resnet,
    "modulation": _hook_modulation,
    "projection": _hook_projection,
}


def _hook_block(recorder: Recorder, denoiser: nn.Module, path: str, place: int) -> Any:
    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        y = output[place] if isinstance(output, tuple) else output
        recorder.influence(f"{path}/influence", x, y)

    return denoiser.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
