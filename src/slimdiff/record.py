"""Recording: hooks that add activations up into statistics while a denoiser runs.

The hooks live inside the `with`; the statistics are the caller's. No activation is kept: each call
adds one Gram matrix per statistic to a sum and forgets its inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.errors import SlimdiffError
from slimdiff.families import groups_of
from slimdiff.groups import Group
from slimdiff.probes import Probes
from slimdiff.statistics import Statistics

WIDE_BUDGET = 2**18


class Recorder:
    """Adds what passes through the hooked layers to `statistics`.

    `weight` multiplies everything that the next denoiser call adds; a calibration loop may set it
    before each call (timestep weights).
    """

    def __init__(
        self, statistics: Statistics, *, seed: int, tokens_per_sample: int, dtype: torch.dtype
    ) -> None:
        self.statistics = statistics
        self.seed = seed
        self.tokens_per_sample = tokens_per_sample
        self.dtype = dtype
        self.weight = 1.0
        self._suspects: dict[str, Tensor] = {}

    def heads_moment(self, name: str, x_bti: Tensor, heads: int) -> None:
        """Add per-head second moments of x (batch, tokens, heads * e) under `name`."""
        x_bhte = _split_heads(self.rows(name, x_bti), heads)
        self._gram(name, x_bhte.transpose(0, 1).flatten(1, 2))

    def keys(self, name: str, k_bti: Tensor, heads: int) -> None:
        """Add the keys' moments, plain and centred over the tokens of each sample.

        Softmax ignores what is constant over the keys of a query, so the centred moment is the one
        that counts.
        """
        centred_bti = k_bti - k_bti.float().mean(1, keepdim=True).to(k_bti.dtype)
        self.heads_moment(name, k_bti, heads)
        self.heads_moment(f"{name}_centred", centred_bti, heads)

    def moment(self, name: str, x_bti: Tensor) -> None:
        """Add the full second moment and the mean magnitude of x (batch, tokens, i)."""
        x_ni = self.rows(name, x_bti).flatten(0, 1)
        self._gram(name, x_ni)
        self._add(f"{name}_magnitude", x_ni.abs().sum(0, dtype=torch.float32), x_ni.shape[0])

    def influence(self, name: str, x_bti: Tensor, y_bti: Tensor) -> None:
        """Add 1 - cos(x, y) over tokens: how much a block turns its input (block influence)."""
        cosine_n = torch.cosine_similarity(x_bti.float(), y_bti.float(), dim=-1).flatten()
        self._add(name, (1 - cosine_n).sum().reshape(1), cosine_n.numel())

    def rows(self, name: str, x_bti: Tensor) -> Tensor:
        """At most `tokens_per_sample` tokens of x (fewer where x is wide), the same every run.

        A Gram matrix of width i costs i^2 a row; beyond 1024 channels rows are thinned so that it
        stays below the cost of the layer that it describes.
        """
        tokens, width = x_bti.shape[1], x_bti.shape[2]
        kept = min(self.tokens_per_sample, max(32, WIDE_BUDGET // width))
        if tokens <= kept:
            return x_bti
        text = f"{self.seed}/{self.statistics.calls}/{name.removesuffix('_centred')}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
        return x_bti.index_select(1, order[:kept].sort().values.to(x_bti.device))

    def begin_call(self, arguments: dict[str, Any]) -> None:
        """Offer the inputs of a denoiser call to the probes."""
        self.statistics.probes.offer(arguments)

    def end_call(self) -> None:
        """Count the call and refuse what was not finite in it.

        Raises:
            SlimdiffError: an activation was NaN or infinite; names the module.
        """
        self.statistics.calls += 1
        suspects, self._suspects = self._suspects, {}
        if suspects and not torch.stack(list(suspects.values())).isfinite().all():
            bad = next(name for name, value in suspects.items() if not value.isfinite())
            raise SlimdiffError(
                f"{bad}: activation is NaN or infinite in denoiser call "
                f"{self.statistics.calls}; run in float32 or bfloat16, or check the weights"
            )

    def _gram(self, name: str, x_ne: Tensor) -> None:
        self._watch(name, x_ne)
        self.statistics.add_gram(name, x_ne, self.weight, self.dtype)

    def _add(self, name: str, total: Tensor, rows: int) -> None:
        self._watch(name, total)
        self.statistics.add(name, self.weight * total.to(self.dtype), self.weight * rows)

    def _watch(self, name: str, x: Tensor) -> None:
        if x.numel() == 0:
            raise SlimdiffError(f"{name}: the activation has zero tokens; expected at least one")
        self._suspects[name] = x.sum(dtype=torch.float32)


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
    ]


def _hook_feed_forward(recorder: Recorder, denoiser: nn.Module, group: Group) -> list[Any]:
    down = denoiser.get_submodule(group.paths["down"])
    return [
        down.register_forward_pre_hook(
            lambda _m, args: recorder.moment(f"{group.layer}/h", args[0])
        )
    ]


HOOKS: dict[str, Callable[[Recorder, nn.Module, Group], list[Any]]] = {
    "query_key": _hook_query_key,
    "value_output": _hook_value_output,
    "feed_forward": _hook_feed_forward,
}


def _hook_block(recorder: Recorder, denoiser: nn.Module, path: str) -> Any:
    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        recorder.influence(f"{path}/influence", x, y)

    return denoiser.get_submodule(path).register_forward_hook(hook, with_kwargs=True)


def _split_heads(x_bti: Tensor, heads: int) -> Tensor:
    return x_bti.unflatten(-1, (heads, -1)).transpose(1, 2)
