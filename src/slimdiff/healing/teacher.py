"""The teacher: the dense denoiser, along its own trajectories of prompts, as users sample it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slimdiff.config import CalibrationConfig
from slimdiff.denoiser import denoiser_of
from slimdiff.errors import SlimdiffError
from slimdiff.evaluate.sampling import generate
from slimdiff.healing.rows import Call, recorded

HELD_OUT_SHARE = 0.1
MOST_HELD_OUT = 32
"""Prompts whose trajectories are sampled to judge by, at most."""


@dataclass(frozen=True)
class Teacher:
    """A dense pipeline, and the prompts that it teaches by.

    Attributes:
        pipe: the dense pipeline; it is not changed.
        prompts: to train on, at least one.
        held_out: to judge by, at least one.
        sampling: how it samples.
        seed: of the noise and of the order of prompts.
    """

    pipe: Any
    prompts: Sequence[str]
    held_out: Sequence[str]
    sampling: CalibrationConfig
    seed: int

    def judged_by(self) -> list[Call]:
        """The calls of the held-out prompts' trajectories, the same ones every time."""
        texts = self.held_out[:MOST_HELD_OUT]
        return self._sampled(texts, [_seed(self.seed, 0, i) for i in range(len(texts))])

    def round(self, number: int, size: int) -> list[Call]:
        """The calls of round 0, 1, 2, ...: `size` prompts, with noise that no other round has.

        Rounds take the prompts in turn, each time in another order; they depend on nothing but
        the seed and their number.
        """
        images = range(number * size, (number + 1) * size)
        texts = [self.prompts[self._order(i // len(self.prompts), i)] for i in images]
        return self._sampled(texts, [_seed(self.seed, 1, i) for i in images])

    def _order(self, turn: int, image: int) -> int:
        generator = torch.Generator().manual_seed(_seed(self.seed, 2, turn))
        order = torch.randperm(len(self.prompts), generator=generator)
        return int(order[image % len(self.prompts)])

    def _sampled(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Call]:
        known = inspect.signature(self.pipe.__call__).parameters
        how = {k: v for k, v in self.sampling.sampling.items() if k == "batch_size" or k in known}
        with recorded(denoiser_of(self.pipe)[1]) as calls:
            generate(self.pipe, prompts, seeds, output_type="latent", **how)
        return calls


def _seed(seed: int, purpose: int, number: int) -> int:
    return (seed * 3 + purpose) * 1_000_000_007 + number


def split(prompts: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Prompts to train on, and a tenth of the distinct ones (at least one) to judge by.

    Raises:
        SlimdiffError: fewer than two distinct prompts.
    """
    distinct = [] if isinstance(prompts, str) else list(dict.fromkeys(prompts))
    if len(distinct) < 2:
        raise SlimdiffError(
            f"got {len(distinct)} distinct prompts to heal with, expected a list of at least 2: "
            f"one in ten is held out to judge by, the others are trained on"
        )
    generator = torch.Generator().manual_seed(_seed(seed, 3, 0))
    order = torch.randperm(len(distinct), generator=generator).tolist()
    count = max(1, round(HELD_OUT_SHARE * len(distinct)))
    return [distinct[i] for i in order[count:]], [distinct[i] for i in order[:count]]
