"""The budget: what the slim denoiser may hold, how long it may take, or what it may lose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import torch

from slimdiff.errors import SlimdiffError

Metric = Literal["params", "macs", "bytes", "latency"]
Amount = float | int | str

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
LARGEST_QUALITY = 0.5


def parse_amount(amount: Amount, name: str) -> float:
    """A share in (0, 1], a count, or a count with a unit such as "700M" or "1.2G", as a number.

    Raises:
        SlimdiffError: not a number, or not positive.
    """
    return _parsed(amount, name, UNITS, "a share such as 0.8 or a count such as 700M")


def _parsed(amount: Amount, name: str, units: Mapping[str, float], expected: str) -> float:
    match = re.fullmatch(r"\s*([0-9.eE+-]+?)\s*([A-Za-z]*)\s*", str(amount))
    try:
        value = float(match[1]) * units[match[2]] if match else float("nan")
    except (ValueError, KeyError):
        value = float("nan")
    if not 0 < value < float("inf"):
        raise SlimdiffError(f"{name} is {amount!r}, expected {expected}")
    return value


@dataclass(frozen=True)
class Budget:
    """What the whole slim denoiser may cost or lose; exactly one of the fields is given.

    Attributes:
        params: parameters that stay: a share in (0, 1] or a count such as "700M".
        macs: multiply-accumulates of one forward that stay: a share or a count such as "300G".
        remove: parameters that go: a share below 1 or a count such as "100M".
        memory: bytes of the saved weights that stay: a count such as "1.2GB", or a share; each
            tensor counts in the dtype that it is saved in.
        speedup: how many times faster one call is to be, measured on the machine at hand.
        latency: what one call may take there, such as "400ms".
        quality: largest velocity error on the probes; within it, MACs are as few as can be.
    """

    params: Amount | None = None
    macs: Amount | None = None
    remove: Amount | None = None
    memory: Amount | None = None
    speedup: Amount | None = None
    latency: Amount | None = None
    quality: Amount | None = None

    def __post_init__(self) -> None:
        names = [f.name for f in fields(self)]
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise SlimdiffError(
                f"a budget is exactly one of {', '.join(names[:-1])} and {names[-1]}, got "
                f"{' and '.join(given) or 'none'}; for example params 0.8"
            )
        self._check(given[0])

    def _check(self, name: str) -> None:
        value, amount = self._value(name), getattr(self, name)
        if name == "speedup" and value < 1:
            raise SlimdiffError(f"speedup is {amount!r}, expected at least 1, such as 1.5")
        if name == "quality" and value > LARGEST_QUALITY:
            raise SlimdiffError(
                f"quality is {amount!r}, expected a velocity error of at most {LARGEST_QUALITY}, "
                f"such as 1e-3"
            )

    def _value(self, name: str) -> float:
        amount = getattr(self, name)
        if name == "memory":
            units = UNITS | {f"{unit}B": size for unit, size in UNITS.items() if unit != "B"}
            return _parsed(amount, name, units, "bytes, such as 1.2GB or 800MB")
        if name == "latency":
            return _parsed(amount, name, SECONDS, "a time such as 400ms or 1.2s")
        if name in ("speedup", "quality"):
            return _parsed(amount, name, {"": 1}, "a number")
        return parse_amount(amount, name)

    @property
    def metric(self) -> Metric:
        """What widths cost."""
        if self.speedup is not None or self.latency is not None:
            return "latency"
        if self.memory is not None:
            return "bytes"
        return "params" if self.macs is None and self.quality is None else "macs"

    @property
    def largest_error(self) -> float | None:
        """What may be lost, where that is the budget."""
        return None if self.quality is None else self._value("quality")

    def limit(self, dense: int) -> int:
        """What may stay when the dense denoiser has `dense`: a count, bytes, or nanoseconds.

        Raises:
            SlimdiffError: more is to be removed than there is.
        """
        if self.speedup is not None:
            return int(dense / self._value("speedup"))
        if self.latency is not None:
            return min(dense, int(1e9 * self._value("latency")))
        names = {"params": "params", "macs": "macs", "bytes": "memory"}
        name = "remove" if self.remove is not None else names[self.metric]
        value = self._value(name)
        count = value * dense if value < 1 or (value == 1 and self.remove is None) else value
        limit = int(dense - count if self.remove is not None else count)
        if limit <= 0:
            raise SlimdiffError(
                f"remove is {self.remove}, but the denoiser has only {dense:,} in all"
            )
        return limit

    def describe(self) -> str:
        """The budget as the command line spells it, such as `--params 0.8`."""
        return next(
            f"--{f.name} {getattr(self, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) is not None
        )


@dataclass(frozen=True)
class Saving:
    """How a model will be saved, where that is not as it stands.

    Bytes are counted so, and errors are of weights that are rounded so.

    Attributes:
        dtypes: parameter or buffer -> dtype in the file.
        header: bytes of the files that belong to no tensor.
    """

    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    header: int = 0
