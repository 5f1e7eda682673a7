"""Targets: what the layers of a slim denoiser should put out, seen in the dense one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.refitting.layers import Candidate
from slimdiff.refitting.rows import choose_places, picked
from slimdiff.refitting.sites import tensors_in, watching


class Targets:
    """Rows of the dense denoiser at chosen places, for each layer and call.

    Attributes:
        rows: path -> for each call (n, o): the stream with the layer's output in it, or what the
            slim layer makes of the dense one's input.
        outputs: what the denoiser puts out, for each call.
    """

    def __init__(
        self,
        dense: nn.Module,
        slim: nn.Module,
        layers: Sequence[Candidate],
        counts: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        """`counts`: path -> places of each sample that count."""
        self.dense, self.slim, self.layers = dense, slim, layers
        self.counts, self.seed = counts, seed
        self.rows: dict[str, list[Tensor]] = {layer.path: [] for layer in layers}
        self.outputs: list[list[Tensor]] = []

    def places(self, layer: Candidate, index: int, samples: int) -> Tensor:
        """Places (b, p) of a call's samples that count for a layer."""
        chance = f"{self.seed}/{layer.first}/{index}"
        return choose_places(self.counts[layer.path], layer.places, samples, chance)

    def record(self, calls: Sequence[Mapping[str, Any]]) -> None:
        """Run the dense denoiser on `calls`, which come after those of before."""
        for call in calls:
            with contextlib.ExitStack() as hooks, torch.inference_mode():
                for layer in self.layers:
                    hooks.enter_context(self._recording(layer, len(self.outputs)))
                self.outputs.append(tensors_in(self.dense(**call)))

    @contextlib.contextmanager
    def _recording(self, layer: Candidate, index: int) -> Iterator[None]:
        module: Any = self.slim.get_submodule(layer.path)

        def keep(tensor: Tensor) -> None:
            places = self.places(layer, index, len(tensor))
            self.rows[layer.path].append(picked(module, tensor, places))

        if not layer.inward:
            with watching(self.dense, layer.site, keep):
                yield
            return
        handle = _before(self.dense.get_submodule(layer.path), lambda x: keep(module(x)))
        try:
            yield
        finally:
            handle.remove()


def _before(module: nn.Module, see: Callable[[Tensor], None]) -> Any:
    return module.register_forward_pre_hook(lambda _module, args: see(args[0]))
