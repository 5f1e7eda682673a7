"""The stage of `compress` that refits: when it runs, and on which prompts."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from slimdiff.config import CalibrationConfig
from slimdiff.denoiser import component_of
from slimdiff.errors import SlimdiffError
from slimdiff.families import family_of
from slimdiff.refit import RefitResult, RefitSettings, refit
from slimdiff.refitting.calls import sampled_calls

Progress = Callable[[str, int, int], None]
Choice = bool | Literal["auto"]

LEAST_ERROR = 1e-5
"""Error on probes below which `auto` leaves a denoiser as it is."""

HELD_OUT = 8
"""One prompt of so many is not solved on, but judges."""

STEPS = 5
"""Denoising steps of a prompt, at most: as many rows of more prompts hold more."""

logger = logging.getLogger(__name__)


def before_refit(denoiser: nn.Module, prompts: Sequence[str], choice: Choice) -> nn.Module | None:
    """A copy of the denoiser as it is, if it may be refit after it was rewritten.

    Raises:
        SlimdiffError: a refit was asked for, but there is one prompt alone, or it is an encoder.
    """
    if choice is False:
        return None
    text = family_of(denoiser).text
    if len(prompts) > 1 and not text:
        return copy.deepcopy(denoiser)
    if choice is True:
        why = "only denoisers are refit" if text else "one prompt is to solve on, another to judge"
        raise SlimdiffError(
            f"refit of {type(denoiser).__name__} with {len(prompts)} prompts: {why}; give more "
            f"prompts, or leave refit out"
        )
    return None


def refit_stage(
    pipe: Any,
    dense: nn.Module | None,
    prompts: Sequence[str],
    config: CalibrationConfig,
    choice: Choice,
    error: float,
    progress: Progress | None = None,
) -> RefitResult | None:
    """Refit the denoiser of `pipe`, unless it lost next to nothing; None where it was left alone.

    Args:
        pipe: a pipeline whose denoiser is slim.
        dense: what `before_refit` kept.
        prompts: calibration prompts: most are solved on, one of `HELD_OUT` judges.
        config: how calibration sampled.
        choice: True, or `auto`: only where `error` is not below `LEAST_ERROR`.
        error: of the slim denoiser on the probes.
        progress: as for `refit`.
    """
    if dense is None or (choice == "auto" and error < LEAST_ERROR):
        return None
    settings = RefitSettings(seed=config.seed)
    judges = max(1, len(prompts) // HELD_OUT)
    parts = (prompts[:-judges], prompts[-judges:])
    name, slim = component_of(pipe)
    first = 1_000_003 * config.seed + 500_000  # noise that calibration did not see
    sampling = config.sampling
    sampling["num_inference_steps"] = min(STEPS, config.num_inference_steps)
    setattr(pipe, name, dense)
    try:
        calls, held_out = (
            sampled_calls(pipe, texts, range(start, start + len(texts)), rows, **sampling)
            for texts, start, rows in zip(
                parts, (first, first + len(parts[0])), settings.rows, strict=True
            )
        )
    finally:
        setattr(pipe, name, slim)
    result = refit(dense, slim, calls, held_out, settings, progress=progress)
    logger.info("refit: %.2e -> %.2e on held-out calls", result.before, result.after)
    return result
