"""Calibration: run prompts through a pipeline as its user would, and record statistics.

The loop is resumable: statistics are saved after every batch of prompts, every batch depends only
on its own prompts and seeds, so a run that was killed goes on from the last finished batch and
ends with bit-identical statistics.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimdiff.config import CalibrationConfig
from slimdiff.denoiser import ENCODERS, component_of, settings
from slimdiff.errors import SlimdiffError
from slimdiff.groups import Group
from slimdiff.probes import Probes
from slimdiff.record import recording
from slimdiff.recorder import Recorder
from slimdiff.statistics import WEIGHTS_FILE, Statistics

Progress = Callable[[str, int, int], None]

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
            unfinished run of the same prompts and configuration.
        progress: called with ("calibrate", prompts done, prompts in all).

    Raises:
        SlimdiffError: no prompts; unknown denoiser; a checkpoint of another run; NaN or infinity
            in an activation (names the module); timestep weights for a text encoder.
    """
    config = config or CalibrationConfig()
    if not prompts or isinstance(prompts, str):
        raise SlimdiffError("no calibration prompts; give a list of at least one")
    name, denoiser = component_of(pipe, component)
    run = _encode if name in ENCODERS else _sample
    if run is _encode and config.timestep_weights != "uniform":
        raise SlimdiffError(
            f"timestep_weights is {config.timestep_weights!r}, but {name} sees no timesteps; leave "
            f"it uniform"
        )
    statistics = _start(denoiser, prompts, config, checkpoint)
    dtype = getattr(torch, config.dtype)
    settings = (config.seed, config.num_probes, config.tokens_per_sample, dtype)
    with recording(denoiser, groups, statistics, *settings) as recorder:
        for start in range(statistics.batches * config.batch_size, len(prompts), config.batch_size):
            batch = prompts[start : start + config.batch_size]
            with _step_weights(recorder, denoiser, config):
                run(pipe, batch, start, config)
            recorder.flush()
            statistics.batches += 1
            if checkpoint is not None:
                statistics.save(checkpoint)
            if progress is not None:
                progress("calibrate", start + len(batch), len(prompts))
    return statistics


def step_weight(step: int, steps: int, lowest: float = 0.5, highest: float = 1.5) -> float:
    """Log-decreasing weight of denoising step 1..steps (OBS-Diff, eq. 4); `highest` at step 1."""
    if steps == 1:
        return highest
    position = math.log(max(steps - step + 1, 1)) / math.log(steps)
    return lowest + (highest - lowest) * position


def _start(
    denoiser: nn.Module,
    prompts: Sequence[str],
    config: CalibrationConfig,
    checkpoint: str | Path | None,
) -> Statistics:
    source = _source(denoiser, prompts, config)
    if checkpoint is None or not (Path(checkpoint) / WEIGHTS_FILE).is_file():
        probes = Probes(config.num_probes, config.seed)
        return Statistics(type(denoiser).__name__, probes, source=source)
    statistics = Statistics.load(checkpoint)
    if differences := _differences(statistics, source):
        raise SlimdiffError(
            f"{checkpoint}: holds statistics of another run ({differences}); give the same prompts "
            f"and options, name another folder, or delete this one to start over"
        )
    logger.info("resuming %s after %d batches", checkpoint, statistics.batches)
    device = next(denoiser.parameters()).device
    statistics.sums = {name: total.to(device) for name, total in statistics.sums.items()}
    return statistics


def _differences(statistics: Statistics, source: dict[str, Any]) -> str:
    """What differs between the run that the statistics are of and this one.

    An option that they do not know is one that was not given.
    """
    pairs = {key: (statistics.source.get(key), now) for key, now in source.items()}
    there, here = pairs.pop("config")
    pairs |= {key: ((there or {}).get(key), now) for key, now in here.items()}
    found = [
        f"other {key.removesuffix('_sha256')}" if key.endswith("_sha256") else f"{key} {a}, not {b}"
        for key, (a, b) in pairs.items()
        if a != b
    ]
    return "; ".join(found)


def _source(
    denoiser: nn.Module, prompts: Sequence[str], config: CalibrationConfig
) -> dict[str, Any]:
    """What identifies a run: two runs with equal sources have equal statistics."""
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    weight = next(denoiser.parameters()).detach().flatten()[:4096].double().cpu()
    return {
        "prompts": len(prompts),
        "prompts_sha256": digest,
        "denoiser_sha256": hashlib.sha256(weight.numpy().tobytes()).hexdigest(),
        "denoiser_dtype": str(next(denoiser.parameters()).dtype),
        "widths_sha256": _slim_digest(denoiser),
        "config": asdict(config),
    }


def _slim_digest(denoiser: nn.Module) -> str | None:
    """What tells a slim denoiser from others of the same dense one; None for a dense one."""
    slim, record = settings(denoiser).get("slimdiff"), getattr(denoiser, "slim_record", None)
    if not slim:
        return None
    text = json.dumps([slim, None if record is None else record.plan.recipe], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sample(pipe: Any, prompts: Sequence[str], first: int, config: CalibrationConfig) -> None:
    generators = [
        torch.Generator().manual_seed(config.seed * 1_000_003 + first + i)
        for i in range(len(prompts))
    ]
    known = inspect.signature(pipe.__call__).parameters
    optional = {
        "guidance_scale": config.guidance_scale,
        "height": config.height,
        "width": config.width,
        "max_sequence_length": config.max_sequence_length,
        "output_type": "latent",
    }
    pipe(
        prompt=list(prompts),
        num_inference_steps=config.num_inference_steps,
        generator=generators,
        **{name: value for name, value in optional.items() if value is not None and name in known},
    )


def _encode(pipe: Any, prompts: Sequence[str], first: int, config: CalibrationConfig) -> None:
    from slimdiff.evaluate.sampling import encode

    encode(pipe, prompts, **config.sampling)


@contextlib.contextmanager
def _step_weights(
    recorder: Recorder, denoiser: nn.Module, config: CalibrationConfig
) -> Iterator[None]:
    """Set the recorder's weight before each denoiser call of one pipeline run."""
    steps = itertools.count(1)

    def weigh(*_: object) -> None:
        recorder.weight = step_weight(next(steps), config.num_inference_steps)

    if config.timestep_weights == "uniform":
        yield
        return
    handle = denoiser.register_forward_pre_hook(weigh)
    try:
        yield
    finally:
        handle.remove()
