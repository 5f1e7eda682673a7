"""Calibration: run prompts through a pipeline as its user would, and record statistics.

The loop is resumable: statistics are saved after every batch of prompts, every batch depends only
on its own prompts and seeds, so a run that was killed goes on from the last finished batch and
ends with bit-identical statistics.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimdiff.chance import seeded
from slimdiff.config import CalibrationConfig
from slimdiff.denoiser import ENCODERS, component_of
from slimdiff.errors import SlimdiffError
from slimdiff.groups import Group
from slimdiff.record import recording
from slimdiff.resuming import started
from slimdiff.statistics import Statistics
from slimdiff.steps import Steps, weighing
from slimdiff.sweep import sweep_timesteps

Progress = Callable[[str, int, int], None]

WHOLE = 16
"""The first of so many batches runs through all denoising steps."""

EMPTY = " "
"""The negative prompt that Qwen-Image's makers recommend where there is none."""

COMPARED_PROMPTS = 16
MOST_HELD_OUT = 32

logger = logging.getLogger(__name__)


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    config: CalibrationConfig | None = None,
    *,
    groups: Sequence[Group] | None = None,
    component: str | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Run `prompts` through `pipe` and return the statistics of its denoiser.

    Args:
        pipe: a diffusers text-to-image pipeline; it is not changed.
        prompts: calibration prompts; images are not decoded.
        config: how to sample.
        groups: what to record for; all groups by default.
        component: a text encoder, to record that instead: it reads the prompts, nothing is drawn.
        checkpoint: folder that is saved after every batch and resumed from if it holds an
            unfinished run of the same prompts, configuration and model; statistics of another
            model are put aside.
        progress: called with ("calibrate", prompts done, prompts in all).

    Raises:
        SlimdiffError: no prompts; unknown denoiser; a checkpoint of another run; NaN or infinity
            in an activation (names the module); timestep weights for a text encoder.
    """
    config = config or CalibrationConfig()
    name, denoiser = component_of(pipe, component)
    _check(prompts, config, name)
    run = _encode if name in ENCODERS else _sample
    statistics = started(pipe, component, prompts, config, checkpoint)
    dtype = getattr(torch, config.dtype)
    settings = (config.seed, config.num_probes, config.tokens_per_sample, dtype)
    runs = schedule(len(prompts), config)
    done = sum(len(run.prompts) for run in runs[: statistics.batches])
    first = next(number for number, own in enumerate(runs) if not own.held_out)
    for number, own in enumerate(runs[statistics.batches :], start=statistics.batches):
        recorder = recording(denoiser, groups, statistics, *settings, held_out=own.held_out)
        steps = Steps(pipe, own.steps) if config.timestep_weights == "log" else None
        with recorder as adding, weighing(adding, denoiser, steps):
            if not own.compared:
                adding.reservoir = None
            run(pipe, [prompts[place] for place in own.prompts], own, config)
        if number == first and run is _sample:
            kept = statistics.seen if statistics.held_out else statistics.probes
            sweep_timesteps(denoiser, groups, statistics, kept, settings)
        statistics.probes.guidance = statistics.seen.guidance = _guidance(pipe, config)
        statistics.batches += 1
        done += len(own.prompts)
        if checkpoint is not None:
            statistics.save(checkpoint)
        if progress is not None:
            progress("calibrate", done, len(prompts))
    return statistics


def _check(prompts: Sequence[str], config: CalibrationConfig, component: str) -> None:
    if not prompts or isinstance(prompts, str):
        raise SlimdiffError("no calibration prompts; give a list of at least one")
    if component in ENCODERS and config.timestep_weights != "uniform":
        raise SlimdiffError(
            f"timestep_weights is {config.timestep_weights!r}, but {component} sees no timesteps; "
            f"leave it uniform"
        )


@dataclass(frozen=True)
class Run:
    """One call of the pipeline during calibration.

    Attributes:
        prompts: their places in the list.
        steps: denoising steps.
        held_out: keeps inputs to measure errors on, and adds nothing to the moments.
        compared: some of its inputs are kept, to tell how much less is lost on them.
    """

    prompts: tuple[int, ...]
    steps: int
    held_out: bool = False
    compared: bool = True


def schedule(count: int, config: CalibrationConfig) -> list[Run]:
    """The runs of a calibration on `count` prompts, in order.

    A tenth of the prompts, spread over the list, is held out: they run through all steps. The
    others run through `steps_per_prompt`, but for the first of every `WHOLE` batches, which runs
    through all steps, so that every timestep is visited.
    """
    held = held_out(count)
    others = [place for place in range(count) if place not in set(held)]
    few = min(config.steps_per_prompt or config.num_inference_steps, config.num_inference_steps)
    runs = [Run(own, config.num_inference_steps, True) for own in _batches(held, config)]
    seen = 0
    for number, own in enumerate(_batches(others, config)):
        steps = few if number % WHOLE else config.num_inference_steps
        compared = not held or seen < COMPARED_PROMPTS
        runs.append(Run(own, steps, compared=compared))
        seen += len(own)
    return runs


def held_out(count: int) -> list[int]:
    """Places of the prompts that give probes and no moments.

    A tenth of them, but at least four of sixteen, two of eight and one of two: half of them choose
    widths, the others judge. A single prompt is not held out: its inputs are all there is.
    """
    if count < 2:
        return []
    least = 4 if count >= 16 else 2 if count >= 8 else 1
    few = min(MOST_HELD_OUT, max(least, round(count / 10)))
    return [(2 * i + 1) * count // (2 * few) for i in range(few)]


def _batches(places: Sequence[int], config: CalibrationConfig) -> list[tuple[int, ...]]:
    size = config.batch_size
    return [tuple(places[start : start + size]) for start in range(0, len(places), size)]


def _guidance(pipe: Any, config: CalibrationConfig) -> float | None:
    """The scale of classifier-free guidance that the pipeline has just run with."""
    parameters = inspect.signature(pipe.__call__).parameters
    if "true_cfg_scale" in parameters:
        return float(parameters["true_cfg_scale"].default)
    scale = getattr(pipe, "guidance_scale", config.guidance_scale)
    return float(scale) if isinstance(scale, int | float) else None


def _sample(pipe: Any, prompts: Sequence[str], run: Run, config: CalibrationConfig) -> None:
    seeds = [config.seed * 1_000_003 + place for place in run.prompts]
    known = inspect.signature(pipe.__call__).parameters
    optional: dict[str, Any] = {
        "guidance_scale": config.guidance_scale,
        "height": config.height,
        "width": config.width,
        "max_sequence_length": config.max_sequence_length,
        "output_type": "latent",
    }
    if "negative_prompt" in known and _guided_by_prompt(known):
        optional["negative_prompt"] = [EMPTY] * len(prompts)
    given = {name: value for name, value in optional.items() if value is not None and name in known}
    with seeded(seeds[0]):
        pipe(
            prompt=list(prompts),
            num_inference_steps=run.steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **given,
        )


def _guided_by_prompt(known: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a pipeline guides by default, but only if it is given a negative prompt."""
    scale = known.get("true_cfg_scale")
    return scale is not None and isinstance(scale.default, int | float) and scale.default > 1


def _encode(pipe: Any, prompts: Sequence[str], _: Run, config: CalibrationConfig) -> None:
    from slimdiff.evaluate.sampling import encode

    encode(pipe, prompts, **config.sampling)
