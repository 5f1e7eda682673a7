"""Refitting: the slim denoiser's weights, solved anew on its own inputs.

Layers are decomposed one by one, each as if all before it were dense. Together they see what the
others have lost. Here they are solved again in the order in which they run: the inputs are those of
the slim denoiser as it is by then, and what a layer should put out is what the *dense* residual
stream holds after it, less what the slim one holds without it. So each layer also mends what was
lost before it (asymmetric calibration; He et al., arXiv 1707.06168, sec. 3.1, for pruned
convolutions; here for every layer that writes to the stream, under its gate).

No gradients; a ridge regression in float64 for each layer, towards its present weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.decompose.ridge import Moments, Rows, chosen_steps, joined
from slimdiff.errors import SlimdiffError
from slimdiff.evaluate.sampling import one_row_of
from slimdiff.families import groups_of
from slimdiff.refitting.calls import count_of
from slimdiff.refitting.layers import Candidate, candidates, together, units
from slimdiff.refitting.replay import Replay
from slimdiff.refitting.rows import inputs_at, picked
from slimdiff.refitting.sites import changed, tensors_in
from slimdiff.refitting.targets import Targets
from slimdiff.refitting.weights import add_, inputs_of, rank_kept, restore_, saved
from slimdiff.wrapped import refuse_replaced

Calls = Sequence[Mapping[str, Any]]
Progress = Callable[[str, int, int], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RefitSettings:
    """How layers are refit.

    Attributes:
        rows: samples of denoiser calls that are solved on, and that judge.
        rows_per_input: rows of a layer's regression, as a multiple of its inputs.
        inward: whether layers that make inner channels are refit too.
        seed: chooses tokens and pixels.
    """

    rows: tuple[int, int] = (1536, 256)
    rows_per_input: float = 24.0
    inward: bool = True
    seed: int = 0


@dataclass(frozen=True)
class LayerRefit:
    """What became of one layer: what it lacks on held-out rows, relative to the stream there."""

    path: str
    before: float
    after: float
    strength: float | None


@dataclass
class RefitResult:
    """What a refit did.

    Attributes:
        layers: those that were looked at, in order.
        before, after: error of the denoiser's output on the held-out calls, relative to dense.
        kept: whether the new weights stay: they do if the error fell.
    """

    layers: list[LayerRefit] = field(default_factory=list)
    before: float = 0.0
    after: float = 0.0
    kept: bool = False


def refit(
    dense: nn.Module,
    slim: nn.Module,
    calls: Calls,
    held_out: Calls,
    settings: RefitSettings | None = None,
    *,
    weights: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    progress: Progress | None = None,
) -> RefitResult:
    """Refit the layers of `slim` in place on its own inputs, towards what `dense` does.

    A layer changes only if it then lacks less on the held-out calls; all changes are undone if the
    denoiser's error there does not fall.

    Args:
        dense: the denoiser that `slim` was made of; not changed.
        slim: of a known family.
        calls: keyword arguments of denoiser calls, each of a few samples, to solve on.
        held_out: others, of prompts that are not among those of `calls`, to judge on.
        settings: how.
        weights: of the samples of each call (samples,), for `calls` and `held_out`; 1 by default.
        progress: called with ("refit", layers done, layers in all).

    Raises:
        SlimdiffError: no calls; something stands over one of the denoisers.
    """
    settings = settings or RefitSettings()
    if not calls or not held_out:
        raise SlimdiffError(
            f"got {len(calls)} calls to refit on and {len(held_out)} to judge by; give at least "
            f"one of each, from different prompts"
        )
    for model in (dense, slim):
        refuse_replaced(model)
    layers = candidates(dense, slim, groups_of(slim), one_row_of(dict(held_out[0])))
    layers = [layer for layer in layers if settings.inward or not layer.inward]
    job = _Job(dense, slim, layers, calls, held_out, settings, weights)
    return job.run(progress)


class _Job:
    """A refit under way: the calls to fit on, and after them those to judge by."""

    def __init__(
        self,
        dense: nn.Module,
        slim: nn.Module,
        layers: Sequence[Candidate],
        calls: Calls,
        held_out: Calls,
        settings: RefitSettings,
        weights: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        self.dense, self.slim, self.layers = dense, slim, layers
        self.calls, self.fitted = [*calls, *held_out], len(calls)
        self.weights = None if weights is None else [*weights[0], *weights[1]]
        samples = sum(count_of(call) for call in calls)
        counts = {layer.path: self._count(layer, samples, settings) for layer in layers}
        self.targets = Targets(dense, slim, layers, counts, settings.seed)

    def _count(self, layer: Candidate, samples: int, settings: RefitSettings) -> int:
        wanted = settings.rows_per_input * inputs_of(self.slim.get_submodule(layer.path))
        return max(1, min(layer.places, math.ceil(wanted / samples)))

    def run(self, progress: Progress | None) -> RefitResult:
        self.targets.record(self.calls)
        paths = [layer.path for layer in self.layers]
        before, result = saved(self.slim, paths), RefitResult()
        replay = Replay(self.slim, self.calls, paths)
        result.before = self._error()
        one = one_row_of(dict(self.calls[0]))
        with replay.keeping(units(self.slim, groups_of(self.slim), one)):
            for layers in together(self.layers):
                result.layers += self._refit(replay, layers)
                for layer in layers:
                    replay.finish(layer.path)
                    self.targets.rows.pop(layer.path)
                if progress is not None:
                    progress("refit", len(result.layers), len(paths))
        result.after = self._error()
        result.kept = result.after < result.before
        if not result.kept:
            restore_(self.slim, before)
        return result

    def _refit(self, replay: Replay, layers: Sequence[Candidate]) -> list[LayerRefit]:
        moments = Moments()
        judged: list[Rows] = []
        for index in range(len(self.calls)):
            rows = self._rows(replay, layers, index)
            if index < self.fitted:
                moments.add(rows)
            else:
                judged.append(rows)
        modules = [self.slim.get_submodule(layer.path) for layer in layers]
        outputs = [self.targets.rows[layer.path][0].shape[1] for layer in layers]
        allowed = rank_kept(modules[0]) if len(modules) == 1 else None
        steps = chosen_steps(moments, joined(judged), outputs, allowed)
        found = []
        for layer, module, step in zip(layers, modules, steps, strict=True):
            if step.step_io is not None:
                add_(module, step.step_io)
            energy = self._energy(layer)
            row = LayerRefit(layer.path, step.before / energy, step.after / energy, step.strength)
            logger.info("%s", row)
            found.append(row)
        return found

    def _energy(self, layer: Candidate) -> float:
        rows = self.targets.rows[layer.path][self.fitted :]
        return sum(float(own.double().square().sum()) for own in rows) or 1.0

    def _rows(self, replay: Replay, layers: Sequence[Candidate], index: int) -> Rows:
        """Inputs of layers in a call, and what they lack: side by side if there are several."""
        paths, site = [layer.path for layer in layers], layers[-1].site
        modules: list[Any] = [self.slim.get_submodule(path) for path in paths]
        call, outputs, stream = replay.seen(index, paths, site)
        places = self.targets.places(layers[0], index, len(stream))
        now = [stream] if len(layers) == 1 else outputs
        lacking = torch.cat(
            [
                (self.targets.rows[path][index] - picked(module, own, places)).float()
                for path, module, own in zip(paths, modules, now, strict=True)
            ],
            1,
        )
        gates: Tensor | None = None
        if site.gated:
            gates = self._gates(replay, layers[0], index, stream, places)
        elif site.gate != 1.0:
            gates = torch.full_like(lacking, site.gate)
        weights = None
        if self.weights is not None:
            weights = self.weights[index].to(lacking).repeat_interleave(places.shape[1])
        return Rows(inputs_at(modules[0], call, places), lacking, gates, weights)

    def _gates(
        self, replay: Replay, layer: Candidate, index: int, stream: Tensor, places: Tensor
    ) -> Tensor:
        """How much a layer's output counts in the stream: what a change of it does there."""
        module: Any = self.slim.get_submodule(layer.path)
        size = 16 * max(float(stream.abs().max()), 1e-3)
        with changed(module, lambda y: torch.full_like(y, size)):
            moved = replay.seen(index, [layer.path], layer.site)[2]
        return (picked(module, moved, places) - picked(module, stream, places)).float() / size

    def _error(self) -> float:
        """Error of the slim denoiser's output on the held-out calls, relative to dense."""
        squared, energy = 0.0, 0.0
        for index in range(self.fitted, len(self.calls)):
            with torch.inference_mode():
                outputs = tensors_in(self.slim(**self.calls[index]))
            for own, dense in zip(outputs, self.targets.outputs[index], strict=True):
                squared += float((own.double() - dense.double()).square().sum())
                energy += float(dense.double().square().sum())
        return squared / energy
