"""The models of the generalisation set: what each one is, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["unet", "sd3"]


@dataclass(frozen=True)
class ModelSpec:
    """A small pipeline that is trained here, from a seed of its own.

    Attributes:
        name: its folder's name.
        kind: `unet`, a StableDiffusionPipeline, or `sd3`, a StableDiffusion3Pipeline.
        world: what it draws: a name in `worlds.WORLDS`.
        seed: of its weights, of the order of its data and of its noise.
        widths: fields of the kind's architecture: see `kinds`.
        steps: training steps; the rate falls over the last `decay` of them.
        batch: pictures per step.
        minutes: about how long that takes on one free core, in bfloat16.
        decay: share of training over which the learning rate falls to zero.
    """

    name: str
    kind: Kind
    world: str
    seed: int
    widths: dict[str, Any] = field(default_factory=dict)
    steps: int = 400
    batch: int = 32
    minutes: float = 12.0
    decay: float = 0.5


SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "scenes-unet-narrow",
            "unet",
            "scenes",
            seed=101,
            widths={
                "unet_channels": (64, 96, 128),
                "unet_heads": (2, 3, 4),
                "norm_groups": 16,
            },
            steps=280,
        ),
        ModelSpec(
            "emoji-unet-small",
            "unet",
            "emoji",
            seed=202,
            widths={
                "unet_channels": (64, 96, 128),
                "unet_heads": (1, 2, 4),
                "norm_groups": 32,
                "attention_levels": 3,
            },
            steps=400,
        ),
        ModelSpec(
            "emoji-sd3-small",
            "sd3",
            "emoji",
            seed=303,
            widths={"heads": 4, "head_width": 40, "layers": 5},
            steps=600,
        ),
        ModelSpec(
            "scenes-unet-deep",
            "unet",
            "scenes",
            seed=404,
            widths={
                "unet_channels": (64, 112, 112),
                "unet_heads": (2, 2, 2),
                "norm_groups": 16,
                "depths": (1, 2, 2),
                "linear": True,
            },
        ),
        ModelSpec(
            "emoji-unet-longer",
            "unet",
            "emoji",
            seed=505,
            widths={
                "unet_channels": (80, 120, 160),
                "unet_heads": (2, 3, 4),
                "norm_groups": 20,
                "attention_levels": 3,
            },
            steps=1000,
            minutes=20.0,
        ),
    )
}
"""Every model that `train` knows, by name."""
