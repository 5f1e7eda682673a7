"""How a slim denoiser is healed, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from slimdiff.errors import SlimdiffError

FALLING = 0.997
"""Of the smallest error so far: an error must be below this to count as falling."""


@dataclass(frozen=True)
class HealConfig:
    """How the slim denoiser is trained to predict what the dense one predicts."""

    learning_rate: float = field(default=2e-4, metadata={"help": "of AdamW, at its highest"})
    betas: tuple[float, float] = field(default=(0.9, 0.99), metadata={"help": "of AdamW"})
    warmup_steps: int = field(default=20, metadata={"help": "steps over which the rate rises"})
    clip: float = field(
        default=2.0, metadata={"help": "longest gradient, as a multiple of its usual length"}
    )
    batch_size: int = field(default=32, metadata={"help": "rows of denoiser calls per step"})
    rows_at_once: int = field(
        default=32, metadata={"help": "rows that are in memory with their gradients at once"}
    )
    round_prompts: int = field(default=8, metadata={"help": "prompts sampled in each round"})
    reuse: float = field(default=4.0, metadata={"help": "how often each row is used, on average"})
    buffer_bytes: int = field(default=1 << 30, metadata={"help": "memory for rows, at most"})
    buffer_rounds: int = field(default=16, metadata={"help": "rounds kept in it, at most"})
    held_out_rows: int = field(default=256, metadata={"help": "rows to judge by, at most"})
    patience: int = field(
        default=10, metadata={"help": "stop after so many rounds without a smaller error"}
    )
    precision: Literal["auto", "bfloat16", "float32"] = field(
        default="auto",
        metadata={
            "help": "of forward and backward passes; auto: bfloat16 where that is fast and "
            "its rounding is small beside the error"
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "less memory, a third more time"}
    )
    save_seconds: float = field(
        default=60.0, metadata={"help": "between two checkpoints, at least"}
    )
    seed: int = field(
        default=0, metadata={"help": "of the noise, and of what is drawn of the rows"}
    )

    def __post_init__(self) -> None:
        counts = ("batch_size", "rows_at_once", "round_prompts", "held_out_rows", "patience")
        for name in (*counts, "buffer_bytes", "buffer_rounds"):
            if getattr(self, name) < 1:
                raise SlimdiffError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip", "reuse"):
            if not 0 < getattr(self, name) < math.inf:
                raise SlimdiffError(f"{name} must be positive, got {getattr(self, name)}")
        known = ("auto", "bfloat16", "float32")
        if self.precision not in known:
            raise SlimdiffError(
                f"precision is {self.precision!r}, expected one of {', '.join(known)}"
            )


@dataclass(frozen=True)
class HealResult:
    """What healing did.

    Errors are squared differences of the predictions to the dense ones, over the squared dense
    predictions, both summed over the same rows of held-out prompts' dense trajectories.

    Attributes:
        before: error before healing.
        after: error of the weights that were kept; at most `before`.
        steps: optimizer steps made, those after the kept weights too.
        seconds: time spent in all, sampling and judging too, over all interrupted runs.
        stopped: `time`, `steps`, `no longer falling` or `not finite`.
        precision: of forward and backward passes.
        history: (step, error) after each round, those of the start first.
        prompts: prompts that were trained on.
        held_out: prompts that were judged by.
    """

    before: float
    after: float
    steps: int
    seconds: float
    stopped: str
    precision: str
    history: list[tuple[int, float]]
    prompts: int
    held_out: int

    def figures(self) -> dict[str, Any]:
        """What goes into a plan's figures, as JSON values."""
        names = ("before", "after", "steps", "seconds", "stopped", "precision")
        told = {name: getattr(self, name) for name in (*names, "prompts", "held_out")}
        return told | {"history": [[step, error] for step, error in self.history]}
