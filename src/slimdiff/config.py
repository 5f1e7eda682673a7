"""What a person chooses: the budget, how to calibrate, and the recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from slimdiff.errors import SlimdiffError

Metric = Literal["params", "macs"]
Amount = float | int | str

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def parse_amount(amount: Amount, name: str) -> float:
    """A share in (0, 1], a count, or a count with a unit such as "700M" or "1.2G", as a number.

    Raises:
        SlimdiffError: not a number, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([KMGBT]?)\s*", str(amount))
    try:
        value = float(match[1]) * UNITS[match[2]] if match else float("nan")
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise SlimdiffError(
            f"{name} is {amount!r}, expected a share such as 0.8 or a count such as 700M"
        )
    return value


@dataclass(frozen=True)
class Budget:
    """What the whole slim denoiser may hold; exactly one of the fields is given.

    Attributes:
        params: parameters that stay: a share in (0, 1] or a count such as "700M".
        macs: multiply-accumulates of one forward that stay: a share or a count such as "300G".
        remove: parameters that go: a share below 1 or a count such as "100M".
    """

    params: Amount | None = None
    macs: Amount | None = None
    remove: Amount | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            raise SlimdiffError(
                f"a budget is exactly one of params, macs and remove, got "
                f"{' and '.join(given) or 'none'}; for example params 0.8"
            )
        parse_amount(getattr(self, given[0]), given[0])

    @property
    def metric(self) -> Metric:
        """What is counted."""
        return "macs" if self.macs is not None else "params"

    def limit(self, dense: int) -> int:
        """The count that may stay when the dense denoiser has `dense` of them.

        Raises:
            SlimdiffError: more is to be removed than there is.
        """
        amount = self.remove if self.remove is not None else getattr(self, self.metric)
        value = parse_amount(amount, self.metric if self.remove is None else "remove")
        count = value * dense if value < 1 or (value == 1 and self.remove is None) else value
        limit = int(dense - count if self.remove is not None else count)
        if limit <= 0:
            raise SlimdiffError(f"remove is {amount}, but the denoiser has only {dense:,} in all")
        return limit

    def describe(self) -> str:
        """The budget as the command line spells it, such as `--params 0.8`."""
        return next(
            f"--{f.name} {getattr(self, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) is not None
        )


@dataclass(frozen=True)
class CalibrationConfig:
    """How the pipeline is sampled while statistics are recorded: as its user would."""

    num_inference_steps: int = field(default=20, metadata={"help": "denoising steps per prompt"})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "classifier-free guidance; default: the pipeline's own"}
    )
    batch_size: int = field(default=4, metadata={"help": "prompts that run together"})
    seed: int = field(default=0, metadata={"help": "seed of the initial noise and of the probes"})
    height: int | None = field(default=None, metadata={"help": "image height in pixels"})
    width: int | None = field(default=None, metadata={"help": "image width in pixels"})
    num_probes: int = field(
        default=16, metadata={"help": "denoiser inputs kept to measure gains on"}
    )
    tokens_per_sample: int = field(
        default=256, metadata={"help": "token rows per image and call that enter a statistic"}
    )
    timestep_weights: Literal["uniform", "log"] = field(
        default="uniform", metadata={"help": "log: early denoising steps weigh more"}
    )
    dtype: Literal["float64", "float32"] = field(
        default="float64", metadata={"help": "precision of the sums"}
    )

    @property
    def sampling(self) -> dict[str, Any]:
        """What `slimdiff.evaluate.generate` takes."""
        names = ("num_inference_steps", "guidance_scale", "batch_size", "height", "width")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "batch_size", "num_probes", "tokens_per_sample"):
            if getattr(self, name) < 1:
                raise SlimdiffError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, known in (
            ("timestep_weights", ("uniform", "log")),
            ("dtype", ("float64", "float32")),
        ):
            if getattr(self, name) not in known:
                raise SlimdiffError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )


@dataclass(frozen=True)
class Recipe:
    """Which decomposition each kind of group gets, and how widths are allocated.

    Attributes:
        keys: moment of the keys: `centred` over the tokens of a sample, or plain `whitened`.
        values: `refit` (post-attention moment, joint refit), `attended` (the same moment, heads
            apart) or `whitened` (moment of v).
        units: order in which hidden units stay: `elimination`, `leverage` or `magnitude`.
        refit: whether the down projection is refit to the units that stay.
        heads: attention loses whole heads by magnitude instead of width per head.
        allocation: default allocation.
    """

    name: str
    keys: Literal["centred", "whitened"] = "centred"
    values: Literal["refit", "attended", "whitened"] = "refit"
    units: Literal["elimination", "leverage", "magnitude"] = "elimination"
    refit: bool = True
    heads: bool = False
    allocation: Literal["probed", "entropic", "uniform", "threshold"] = "probed"


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("slimdiff"),
        Recipe(
            "paper", keys="whitened", values="whitened", units="leverage", allocation="entropic"
        ),
        Recipe("magnitude", units="magnitude", refit=False, heads=True, allocation="threshold"),
    )
}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        SlimdiffError: unknown; the error lists what is known.
    """
    if name not in RECIPES:
        raise SlimdiffError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]
