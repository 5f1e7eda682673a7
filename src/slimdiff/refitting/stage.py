"""The refit as a stage of a compression: whether it pays, what it is solved on, what is noted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from slimdiff.calibrate import held_out as held_out_places
from slimdiff.denoiser import ENCODERS, denoiser_of, settings, standing_in
from slimdiff.errors import SlimdiffError
from slimdiff.held_out import HeldOut
from slimdiff.journal import Journal
from slimdiff.plan import Plan
from slimdiff.refit import RefitSettings, refit
from slimdiff.refitting.calls import sampled_calls

WORTHWHILE = 1e-4
"""Error on held-out prompts from which on a refit is made unless it is told not to: below it layers
lose so little together that there is nothing to mend."""

JUDGING_SHARE = 10
"""One prompt in so many of those that give moments chooses each layer's ridge instead."""

FEWEST_PROMPTS = 16

SAMPLES = (480, 96)
"""Rows of denoiser calls that are solved on, and that choose ridges."""


def check_refit(wanted: bool | None, component: str, prompts: int) -> None:
    """Refuse what cannot be refit, before minutes are spent on slimming.

    Raises:
        SlimdiffError: a text encoder; too few prompts.
    """
    if wanted and component in ENCODERS:
        raise SlimdiffError(f"refitting is for denoisers; leave it out for {component}")
    if wanted and prompts < FEWEST_PROMPTS:
        raise SlimdiffError(
            f"got {prompts} prompts, but a refit needs at least {FEWEST_PROMPTS}: some solve it, "
            f"others choose its ridge; give more, or leave it out"
        )


def may_refit(wanted: bool | None, recipe: str, component: str, prompts: int) -> bool:
    """Whether a refit may follow, so that the dense denoiser has to be kept.

    Args:
        wanted: as the caller has it; None leaves it to what is measured.
        recipe: others than slimdiff's own are left as their papers have them, unless told.
        component: of the pipeline.
        prompts: how many there are.
    """
    if wanted is None:
        return recipe == "slimdiff" and component not in ENCODERS and prompts >= FEWEST_PROMPTS
    return wanted


def refit_slimmed(
    journal: Journal,
    dense: nn.Module,
    plan: Plan,
    held_out: HeldOut,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Refit what a compression made of `dense`, and note it in the figures of its plan.

    Without being told to, only where the plan's figures say that enough is lost. The weights change
    only if the error falls on prompts that the refit does not solve on; prompts that calibration
    held out are not used.

    Args:
        journal: its pipeline has the slim denoiser.
        dense: a copy of the denoiser as it was.
        plan: with its error on held-out prompts.
        held_out: measures that again.
        progress: called with ("refit", layers done, in all).
    """
    before = plan.figures["error_on_probes"]
    if journal.settings["refit"] is None and before < WORTHWHILE:
        return
    slim: Any = denoiser_of(journal.pipe)[1]
    how = RefitSettings(rows=SAMPLES)
    with journal.timed("refit"):
        with standing_in(journal.pipe, dense) as pipe:
            fit, judging = _calls(journal, pipe, how)
        result = refit(dense, slim, fit, judging, how, progress=progress)
        journal.round()
    changed = sum(layer.strength is not None for layer in result.layers) if result.kept else 0
    if changed:
        slim.register_to_config(
            slimdiff=settings(slim)["slimdiff"] | {"refit": {"layers": changed}}
        )
    plan.figures["refit"] = {"before": before, "layers": changed}
    plan.figures.update(held_out.figures())


def _calls(journal: Journal, pipe: Any, how: RefitSettings) -> tuple[list[Any], list[Any]]:
    """Calls to solve on and to choose ridges by, of other prompts, along few-step trajectories."""
    config, held = journal.config, set(held_out_places(len(journal.prompts)))
    texts = [text for place, text in enumerate(journal.prompts) if place not in held]
    sides = [text for i, text in enumerate(texts) if i % JUDGING_SHARE], texts[::JUDGING_SHARE]
    steps = min(config.steps_per_prompt or config.num_inference_steps, config.num_inference_steps)
    sampling = config.sampling | {"num_inference_steps": steps}
    found = []
    for own, rows, seed in zip(sides, how.rows, (0, 10**6), strict=True):
        own = own[: math.ceil(rows / steps)]
        seeds = range(seed, seed + len(own))
        found.append(sampled_calls(pipe, own, seeds, rows, **sampling))
    return found[0], found[1]
