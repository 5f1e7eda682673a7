"""The student: the slim denoiser in float32, with its optimizer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.healing.config import HealConfig
from slimdiff.healing.rows import Batch

ROUNDING = 1 / 30
"""Of the error to mend: bfloat16 is chosen where its rounding makes a smaller one."""
FAST_CPU = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
"""What torch.cpu calls the instructions that make bfloat16 fast."""
MOMENTS = ("exp_avg", "exp_avg_sq")
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


class Student:
    """A denoiser in training: float32 masters, gradients, moments.

    Use it in a `with`: afterwards the denoiser has its dtypes and flags again, and the weights of
    the last `keep` or `restore`, or those that it came with.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        config: HealConfig,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """`dtypes` are those that parameters will be saved in, by name; else those they have."""
        self.denoiser, self.config = denoiser, config
        parameters = denoiser.named_parameters()
        self.parameters = {name: p for name, p in parameters if p.is_floating_point()}
        first = next(iter(self.parameters.values()))
        self.device, self.dtype = first.device, first.dtype
        self.precision = torch.float32
        held = {
            name: (p.dtype, (dtypes or {}).get(name, p.dtype))
            for name, p in self.parameters.items()
        }
        self._rounding = {n: kinds for n, kinds in held.items() if set(kinds) != {torch.float32}}
        self.best: dict[str, Tensor] = {}
        self.usual_norm = 0.0

    def __enter__(self) -> Student:
        self._flags = {name: p.requires_grad for name, p in self.denoiser.named_parameters()}
        self._training = self.denoiser.training
        narrow = [b for b in self.denoiser.buffers() if b.dtype in SIXTEEN_BITS]
        self._before = [(t, t.data) for t in (*self.parameters.values(), *narrow)]
        for tensor, data in self._before:
            # Convolutions' gradients in bfloat16 take minutes on a CPU if channels come last.
            layout = torch.contiguous_format if data.is_cpu else torch.preserve_format
            tensor.data = data.to(torch.float32, memory_format=layout, copy=True)
        self.denoiser.requires_grad_(False).eval()
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self._checkpointing(self.config.gradient_checkpointing)
        groups = [{"params": list(self.parameters.values())}]
        self.optimizer = torch.optim.AdamW(groups, betas=self.config.betas, weight_decay=0.0)
        return self

    def __exit__(self, *_: object) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._checkpointing(False)
        with torch.no_grad():
            for tensor, data in self._before:
                tensor.data = data
            for name, value in self.best.items():
                self.parameters[name].copy_(value)
        for name, parameter in self.denoiser.named_parameters():
            parameter.requires_grad_(self._flags[name])
        self.denoiser.train(self._training)

    def step(self, batches: Iterable[Batch], energy: float, rate: float) -> bool:
        """One update at a learning rate; False, and none, if a gradient is not finite.

        Args:
            batches: rows with their targets.
            energy: what their squared differences are relative to.
            rate: learning rate.
        """
        self.optimizer.zero_grad(set_to_none=True)
        for arguments, target in batches:
            difference = self._predicted(arguments, self.precision) - target.float()
            (difference.square().sum() / energy).backward()
        norm = float(self._norm())
        if not math.isfinite(norm):
            return False
        self._clip(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return True

    @torch.no_grad()
    def error(self, batches: Iterable[Batch], precision: torch.dtype | None = None) -> float:
        """Squared differences over squared targets, in the dtype that the denoiser came in."""
        squared = energy = torch.zeros((), dtype=torch.float64, device=self._wide)
        for arguments, target in batches:
            target = target.to(energy)
            predicted = self._predicted(arguments, precision or self.dtype).to(energy)
            squared = squared + (predicted - target).square().sum()
            energy = energy + target.square().sum()
        return float(squared / energy)

    def choose_precision(self, batches: list[Batch], error: float) -> None:
        """Settle in which precision to train, where the error to mend is `error`.

        What bfloat16 rounds is measured against float32.
        """
        wanted = self.config.precision
        if wanted == "bfloat16":
            self.precision = torch.bfloat16
        if wanted != "auto" or not has_fast_bfloat16(self.device):
            return
        with torch.no_grad():
            wide = ((a, self._predicted(a, torch.float32)) for a, _ in batches)
            rounding = self.error(wide, torch.bfloat16)
        if rounding < ROUNDING * error:
            self.precision = torch.bfloat16

    def keep(self) -> bool:
        """Keep the present weights, the best so far; False, and not, where they leave the range."""
        with self.rounded():
            finite = [t.to(data.dtype).isfinite().all() for t, data in self._before]
        if not bool(torch.stack(finite).all()):
            return False
        self.best = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
        return True

    @contextlib.contextmanager
    def rounded(self) -> Iterator[None]:
        """Inside, the masters have the values that the denoiser will hold and save."""
        masters = {name: self.parameters[name].data for name in self._rounding}
        for name, kinds in self._rounding.items():
            value = masters[name]
            for kind in kinds:
                value = value.to(kind)
            self.parameters[name].data = value.float()
        try:
            yield
        finally:
            for name, master in masters.items():
                self.parameters[name].data = master

    @property
    def _wide(self) -> torch.device:
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def _predicted(self, arguments: Mapping[str, Any], precision: torch.dtype) -> Tensor:
        wide = {name: _float32(value) for name, value in arguments.items()}
        kind, narrow = self.device.type, precision in SIXTEEN_BITS
        with torch.autocast(kind, precision if narrow else None, enabled=narrow):
            output: Tensor = self.denoiser(**wide)[0]
        return output.float()

    def _norm(self) -> Tensor:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _clip(self, norm: float) -> None:
        """Shorten gradients beyond a multiple of their usual length, a running mean."""
        usual = self.usual_norm or norm
        longest = self.config.clip * usual
        gradients = [p for p in self.parameters.values() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(gradients, longest, torch.tensor(norm))
        self.usual_norm = 0.95 * usual + 0.05 * min(norm, longest)

    def _checkpointing(self, wanted: bool) -> None:
        name = f"{'enable' if wanted else 'disable'}_gradient_checkpointing"
        if wanted != getattr(self.denoiser, "is_gradient_checkpointing", False):
            getattr(self.denoiser, name)()

    def state(self) -> dict[str, Tensor]:
        """Weights, moments and best weights by `kind/name`, for saving."""
        state = {f"weight/{name}": p.detach() for name, p in self.parameters.items()}
        state |= {f"best/{name}": value for name, value in self.best.items()}
        state["usual_norm"] = torch.tensor(self.usual_norm, dtype=torch.float64)
        for name, parameter in self.parameters.items():
            own = self.optimizer.state.get(parameter, {})
            state |= {f"{key}/{name}": value for key, value in own.items()}
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned; of a run that ended only the best weights are there."""
        kept = {name: f"best/{name}" for name in self.parameters}
        self.best = {name: state[key].clone() for name, key in kept.items() if key in state}
        if "usual_norm" not in state:
            return
        self.usual_norm = float(state["usual_norm"])
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"weight/{name}"])
            moments = {key: state.get(f"{key}/{name}") for key in ("step", *MOMENTS)}
            if moments["step"] is not None:
                device = {key: self.device for key in MOMENTS} | {"step": torch.device("cpu")}
                own = {k: v.to(device[k], copy=True) for k, v in moments.items() if v is not None}
                self.optimizer.state[parameter] = own


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        known = (getattr(torch.cpu, name, None) for name in FAST_CPU)
        return any(supported() for supported in known if supported is not None)
    return False


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _float32(part) for name, part in value.items()}
    return tuple(_float32(part) for part in value) if isinstance(value, tuple) else value
