"""Probing: the denoiser's output on its probes, with changed weights against dense ones."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from slimdiff.errors import SlimdiffError
from slimdiff.families import family_of
from slimdiff.forwards import replacing
from slimdiff.guided import Predictions, interval
from slimdiff.probes import Probes

STAGE = re.compile(r"((text_model\.)?encoder\.)?[^.]+(\.\d+)?")
"""Paths of the parts that a denoiser runs one after another, such as `down_blocks.0`, or those of a
text encoder, such as `encoder.layers.0`."""

PROBE_BATCH = 8
"""Rows of a call on probes."""

PENULTIMATE = -2
"""The hidden states of a text encoder that SDXL and SD3 take."""


def tensors_of(output: Any) -> list[Tensor]:
    """What a denoiser puts out: one tensor, or those of all levels (a ControlNet's)."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in tensors_of(part)]


def encoded(output: tuple[Any, ...], mask_bt: Tensor | None) -> list[Tensor]:
    """What a text encoder puts out, of its hidden states only the last but one.

    Rows (batch, tokens, channels) are 0 where `mask_bt` says that they are padding.
    """
    tensors = [part if isinstance(part, Tensor) else part[PENULTIMATE] for part in output]
    if mask_bt is None:
        return tensors
    return [mask_bt.unsqueeze(-1) * x if x.ndim == 3 else x for x in tensors]


@dataclass(frozen=True)
class Measured:
    """A relative squared error and its 95 % interval over prompts (None with a single prompt)."""

    error: float
    interval: tuple[float, float] | None


class Probed:
    """A denoiser's outputs on its probes, to compare changed weights with.

    The outputs of a text encoder (states, pooled state, projection) count alike, whatever their
    size: each is relative to its own. Where probes are guided, errors are those of the guided
    prediction.

    What a stage puts out before the changed weight is reached is the same as in the dense run: it
    is kept from there, so that only the rest of the denoiser runs again.
    """

    def __init__(self, denoiser: nn.Module, probes: Probes, size: int = PROBE_BATCH) -> None:
        if not probes.rows:
            raise SlimdiffError(
                "the statistics hold no probes, so gains cannot be measured; record with "
                "num_probes of at least 1, or choose another allocation than `probed`"
            )
        self.denoiser = denoiser
        self.batches = probes.batches(size, next(denoiser.parameters()).device)
        self.guided = Predictions.of(probes, size, guided=True)
        self.plain = Predictions.of(probes, size, guided=False)
        self.text = family_of(denoiser).text
        self.stages: list[str] = []
        self.kept: list[dict[str, Any]] = []
        self.dense = [self._dense_output(batch) for batch in self.batches]
        self.energies = {how: self._sums(how, self.dense) for how in (self.guided, self.plain)}

    @property
    def guides(self) -> bool:
        """Whether any prediction is put together from the halves of guidance."""
        return len(self.guided.prompts) < len(self.plain.prompts)

    def error(self, weights: dict[str, Tensor]) -> float:
        """Relative squared error of the output with these parameters swapped in for one run.

        Without weights: of the denoiser as it stands now.
        """
        return float(self.measure(weights).error)

    def measure(self, weights: dict[str, Tensor], *, guided: bool = True) -> Measured:
        """As `error`, with an interval over prompts.

        Args:
            weights: parameters by name.
            guided: of the guided predictions, else of all rows, each half of guidance by itself.
        """
        return self.measured(self.differences(weights), guided=guided)

    def differences(self, weights: dict[str, Tensor]) -> list[list[Tensor]]:
        """What these parameters change of each output (call by call, place by place)."""
        outputs = [self._output(i, weights) for i in range(len(self.dense))]
        return [
            [a - b for a, b in zip(own, dense, strict=True)]
            for own, dense in zip(outputs, self.dense, strict=True)
        ]

    def measured(self, differences: Sequence[list[Tensor]], *, guided: bool = True) -> Measured:
        """The relative squared error that differences of the outputs are."""
        how = self.guided if guided else self.plain
        squared, energies = self._sums(how, differences), self.energies[how]
        pairs = [(s, e, e.sum()) for s, e in zip(squared, energies, strict=True)]
        shares = [(s / total, e / total) for s, e, total in pairs if total > 0]
        if not shares:
            return Measured(0.0, None)
        squared_s, energy_s = (torch.stack(part).mean(0) for part in zip(*shares, strict=True))
        ends = interval(squared_s, energy_s, how.prompts)
        return Measured(float(squared_s.sum()), ends)

    def _sums(self, how: Predictions, calls: Sequence[list[Tensor]]) -> list[Tensor]:
        """Squared norms by prediction: of each place of a text encoder, else of all together."""
        places = [how.energy(place) for place in zip(*calls, strict=True)]
        return places if self.text else [torch.stack(places).sum(0)]

    def _output(self, i: int, weights: dict[str, Tensor]) -> list[Tensor]:
        with torch.inference_mode(), self._skipping(i, self._unchanged(weights)):
            output = functional_call(self.denoiser, weights, (), self.batches[i])
            return self._tensors(output, self.batches[i])

    def _tensors(self, output: Any, batch: dict[str, Any]) -> list[Tensor]:
        return encoded(output, batch.get("attention_mask")) if self.text else tensors_of(output)

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
                outputs = self._tensors(self.denoiser(**batch), batch)
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
        kept = self.kept[i]
        modules = {path: self.denoiser.get_submodule(path) for path in stages}
        with replacing(modules, lambda path, _own: lambda *_args, **_kwargs: kept[path]):
            yield
