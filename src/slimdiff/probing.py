"""Probing: the denoiser's output on its probes, with changed weights against dense ones."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from slimdiff.errors import SlimdiffError

STAGE = re.compile(r"[^.]+(\.\d+)?")
"""Paths of the parts that a denoiser runs one after another, such as `down_blocks.0`."""


def tensors_of(output: Any) -> list[Tensor]:
    """What a denoiser puts out: one tensor, or those of all levels (a ControlNet's)."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in tensors_of(part)]


class Probed:
    """A denoiser's outputs on its probes, to compare changed weights with.

    What a stage puts out before the changed weight is reached is the same as in the dense run: it
    is kept from there, so that only the rest of the denoiser runs again.
    """

    def __init__(self, denoiser: nn.Module, batches: Sequence[dict[str, Any]]) -> None:
        if not batches:
            raise SlimdiffError(
                "the statistics hold no probes, so gains cannot be measured; record with "
                "num_probes of at least 1, or choose another allocation than `probed`"
            )
        self.denoiser, self.batches = denoiser, batches
        self.stages: list[str] = []
        self.kept: list[dict[str, Any]] = []
        self.dense = [self._dense_output(batch) for batch in batches]
        self.energy = sum(float(y.double().square().sum()) for ys in self.dense for y in ys)

    def error(self, weights: dict[str, Tensor]) -> float:
        """Relative squared error of the output with these parameters swapped in for one run.

        Without weights: of the denoiser as it stands now.
        """
        squared = sum(
            float((own.double() - dense.double()).square().sum())
            for i, outputs in enumerate(self.dense)
            for own, dense in zip(self._output(i, weights), outputs, strict=True)
        )
        return squared / self.energy if self.energy else 0.0

    def _output(self, i: int, weights: dict[str, Tensor]) -> list[Tensor]:
        with torch.inference_mode(), self._skipping(i, self._unchanged(weights)):
            return tensors_of(functional_call(self.denoiser, weights, (), self.batches[i]))

    def _dense_output(self, batch: dict[str, Any]) -> list[Tensor]:
        order: list[str] = []
        kept: dict[str, Any] = {}

        def keep(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                order.append(path)
                kept[path] = output

            return hook

        handles = [
            module.register_forward_hook(keep(path))
            for path, module in self.denoiser.named_modules()
            if STAGE.fullmatch(path) and not isinstance(module, nn.ModuleList)
        ]
        try:
            with torch.inference_mode():
                outputs = tensors_of(self.denoiser(**batch))
        finally:
            for handle in handles:
                handle.remove()
        self.stages = [path for path in order if order.count(path) == 1]
        self.kept.append(kept)
        return outputs

    def _unchanged(self, weights: dict[str, Tensor]) -> list[str]:
        """The stages that finish before any of the weights is used."""
        unchanged: list[str] = []
        for stage in self.stages if weights else []:
            if any(name.startswith(f"{stage}.") for name in weights):
                return unchanged
            unchanged.append(stage)
        return []

    @contextlib.contextmanager
    def _skipping(self, i: int, stages: Sequence[str]) -> Iterator[None]:
        modules = [self.denoiser.get_submodule(path) for path in stages]
        for path, module in zip(stages, modules, strict=True):
            output = self.kept[i][path]
            module.forward = lambda *_args, _output=output, **_kwargs: _output
        try:
            yield
        finally:
            for module in modules:
                del module.forward
