"""Muon for matrices and AdamW for the rest, on float32 copies of the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rates:
    """Learning rates and moments of both rules."""

    muon: float = 2e-3
    adam: float = 6e-4
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05


def warm_and_decay(step: int, steps: int, warmup: int = 30, decay: float = 0.6) -> float:
    """Share of the base learning rate: linear up, flat, linear down over the last `decay`."""
    return min(1.0, (step + 1) / warmup, (1 - step / steps) / decay)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of `matrices` (n, rows, columns), rows <= columns, towards 1.

    The quintic Newton-Schulz iteration of Muon (Jordan et al. 2024), in bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.to(matrices.dtype)


class Optimizer:
    """Keeps float32 masters, moments and an average of named parameters.

    A parameter follows Muon where `is_matrix(name, parameter)`, AdamW elsewhere. Parameters may
    be of a lower precision: each step ends by copying the masters into them.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        is_matrix: Callable[[str, Tensor], bool],
        rates: Rates,
    ) -> None:
        self.parameters = dict(parameters)
        self.rates = rates
        self.matrices = [n for n, p in self.parameters.items() if is_matrix(n, p)]
        self.others = [n for n in self.parameters if n not in set(self.matrices)]
        masters = {n: p.detach().float().clone() for n, p in self.parameters.items()}
        zeros = {n: torch.zeros_like(m) for n, m in masters.items()}
        self.tensors: dict[str, dict[str, Tensor]] = {
            "master": masters,
            "average": {n: m.clone() for n, m in masters.items()},
            "first": zeros,
            "second": {n: torch.zeros_like(masters[n]) for n in self.others},
        }

    @torch.no_grad()
    def step(self, count: int, rate: float, average_decay: float, clip: float = 1.0) -> Tensor:
        """Apply the `count`-th update (from 1) at `rate` times the base rates; gradient norm."""
        grads = {n: p.grad.float() for n, p in self.parameters.items() if p.grad is not None}
        norm = torch.stack(torch._foreach_norm(list(grads.values()))).norm()
        scale = (clip / (norm + 1e-6)).clamp(max=1.0)
        self._adam({n: grads[n] * scale for n in self.others if n in grads}, count, rate)
        self._muon({n: grads[n] for n in self.matrices if n in grads}, rate)
        self._publish(average_decay)
        return norm

    def _adam(self, grads: Mapping[str, Tensor], count: int, rate: float) -> None:
        beta1, beta2 = self.rates.betas
        found = list(grads.values())
        masters, first, second = (self._of(kind, grads) for kind in ("master", "first", "second"))
        torch._foreach_lerp_(first, found, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, found, found, value=1 - beta2)
        scale = torch._foreach_div(second, 1 - beta2**count)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, 1e-8)
        step = -rate * self.rates.adam / (1 - beta1**count)
        torch._foreach_addcdiv_(masters, first, scale, value=step)

    def _of(self, kind: str, names: Iterable[str]) -> list[Tensor]:
        return [self.tensors[kind][name] for name in names]

    def _muon(self, grads: Mapping[str, Tensor], rate: float) -> None:
        lr, shapes = rate * self.rates.muon, defaultdict(list)
        for name, grad in grads.items():
            first = self.tensors["first"][name]
            first.lerp_(grad, 1 - self.rates.momentum)
            ahead = grad.lerp(first, self.rates.momentum).flatten(1)
            wide = ahead if ahead.shape[0] <= ahead.shape[1] else ahead.mT
            shapes[tuple(wide.shape)].append((name, wide))
        for (_, columns), members in shapes.items():
            updates = orthogonalise(torch.stack([wide for _, wide in members]))
            for (name, _), update in zip(members, updates):
                master = self.tensors["master"][name]
                narrow = update if master.shape[0] == update.shape[0] else update.mT
                master.mul_(1 - lr * self.rates.weight_decay)
                master.add_(narrow.reshape(master.shape), alpha=-lr * 0.2 * columns**0.5)

    def _publish(self, average_decay: float) -> None:
        masters, averages = (self._of(kind, self.parameters) for kind in ("master", "average"))
        torch._foreach_lerp_(averages, masters, 1 - average_decay)
        torch._foreach_copy_(list(self.parameters.values()), masters)

    def state(self) -> dict[str, Tensor]:
        """Every tensor by "kind/name", for saving."""
        return {f"{k}/{n}": t for k, group in self.tensors.items() for n, t in group.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned and copy the masters into the parameters."""
        for key, tensor in self.state().items():
            tensor.copy_(state[key])
        for name, parameter in self.parameters.items():
            parameter.copy_(self.tensors["master"][name])
