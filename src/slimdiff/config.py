"""What a person chooses: how to calibrate, and the recipe (the budget: see `budget`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from slimdiff.errors import SlimdiffError


@dataclass(frozen=True)
class CalibrationConfig:
    """How the pipeline is sampled while statistics are recorded: as its user would."""

    num_inference_steps: int = field(default=20, metadata={"help": "denoising steps per prompt"})
    steps_per_prompt: int | None = field(
        default=5,
        metadata={"help": "steps that most calibration prompts run through; None: all"},
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "classifier-free guidance; default: the pipeline's own"}
    )
    batch_size: int = field(default=4, metadata={"help": "prompts that run together"})
    seed: int = field(default=0, metadata={"help": "seed of the initial noise and of the probes"})
    height: int | None = field(default=None, metadata={"help": "image height in pixels"})
    width: int | None = field(default=None, metadata={"help": "image width in pixels"})
    max_sequence_length: int | None = field(
        default=None,
        metadata={"help": "text tokens per prompt, where the pipeline's call takes this (T5)"},
    )
    num_probes: int = field(
        default=32,
        metadata={
            "help": "points of held-out trajectories kept: half to choose widths by, half to judge"
        },
    )
    tokens_per_sample: int = field(
        default=64, metadata={"help": "token rows per image and call that enter a statistic"}
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
        names = (
            *("num_inference_steps", "guidance_scale", "batch_size"),
            *("height", "width", "max_sequence_length"),
        )
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "batch_size", "num_probes", "tokens_per_sample"):
            if getattr(self, name) < 1:
                raise SlimdiffError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps_per_prompt is not None and self.steps_per_prompt < 1:
            raise SlimdiffError(
                f"steps_per_prompt must be at least 1, got {self.steps_per_prompt}; None runs all"
            )
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
        layers: what may shrink: `attention`, `feed_forward`, `resnet`, `modulation` and
            `projection`.
    """

    name: str
    keys: Literal["centred", "whitened"] = "centred"
    values: Literal["refit", "attended", "whitened"] = "refit"
    units: Literal["elimination", "leverage", "magnitude"] = "elimination"
    refit: bool = True
    heads: bool = False
    allocation: Literal["probed", "entropic", "uniform", "threshold"] = "probed"
    layers: tuple[str, ...] = ("attention", "feed_forward", "resnet", "modulation", "projection")


TRANSFORMER = ("attention", "feed_forward")

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("slimdiff"),
        Recipe(
            "paper",
            keys="whitened",
            values="whitened",
            units="leverage",
            allocation="entropic",
            layers=TRANSFORMER,
        ),
        Recipe(
            "magnitude",
            units="magnitude",
            refit=False,
            heads=True,
            allocation="threshold",
            layers=TRANSFORMER,
        ),
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
