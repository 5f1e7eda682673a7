"""Resuming: whether statistics on disk are of the very run and model at hand."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from slimdiff.config import CalibrationConfig
from slimdiff.denoiser import component_of, settings
from slimdiff.digest import differences, model_digest
from slimdiff.errors import SlimdiffError
from slimdiff.probes import Probes
from slimdiff.statistics import WEIGHTS_FILE, Statistics
from slimdiff.statistics_file import read_header

EARLIER_FILE = "earlier-statistics.safetensors"
"""Statistics of another model that were in the way; nothing reads them."""

logger = logging.getLogger(__name__)


def started(
    pipe: Any,
    component: str | None,
    prompts: Sequence[str],
    config: CalibrationConfig,
    checkpoint: str | Path | None,
) -> Statistics:
    """The statistics in `checkpoint` if they are of this run, else empty ones.

    Those of the same run of another model (other weights, scheduler, text encoder, tokenizer or
    pipeline) are put aside, with a warning that names what differs.

    Raises:
        SlimdiffError: other prompts, options, dtype or widths; a damaged file.
    """
    denoiser = component_of(pipe, component)[1]
    source = _source(pipe, component, prompts, config)
    fresh = Statistics(
        type(denoiser).__name__, Probes(config.num_probes, config.seed), source=source
    )
    path = None if checkpoint is None else Path(checkpoint) / WEIGHTS_FILE
    if path is None or not path.is_file() or not _fits(path, source):
        return fresh
    statistics = Statistics.load(path.parent)
    logger.info("resuming %s after %d batches", checkpoint, statistics.batches)
    device = next(denoiser.parameters()).device
    statistics.sums = {name: total.to(device) for name, total in statistics.sums.items()}
    return statistics


def _fits(path: Path, source: Mapping[str, Any]) -> bool:
    """Whether statistics are of this run and model; of another model, they are put aside."""
    kept = read_header(path)["source"]
    model = differences(kept.get("model"), source["model"])
    if run := _run_differences(kept, source):
        raise SlimdiffError(
            f"{path.parent}: holds statistics of another run ({'; '.join([*run, *model])}); give "
            f"the same prompts and options, name another folder, or delete this one to start over"
        )
    if model:
        path.replace(path.with_name(EARLIER_FILE))
        logger.warning(
            "warning: the statistics in %s are of another model (%s); they are now in %s, and it "
            "is calibrated again",
            *(path.parent, "; ".join(model), EARLIER_FILE),
        )
    return not model


def _run_differences(kept: Mapping[str, Any], source: Mapping[str, Any]) -> list[str]:
    """What differs between the run that statistics are of and this one, but for the model.

    An option that they do not know is one that was not given.
    """
    pairs = {key: (kept.get(key), now) for key, now in source.items() if key != "model"}
    there, here = pairs.pop("config")
    pairs |= {key: ((there or {}).get(key), now) for key, now in here.items()}
    return [
        f"other {key.removesuffix('_sha256')}" if key.endswith("_sha256") else f"{key} {a}, not {b}"
        for key, (a, b) in pairs.items()
        if a != b
    ]


def _source(
    pipe: Any, component: str | None, prompts: Sequence[str], config: CalibrationConfig
) -> dict[str, Any]:
    """What identifies a run: two runs with equal sources have equal statistics."""
    denoiser = component_of(pipe, component)[1]
    return {
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "denoiser_dtype": str(next(denoiser.parameters()).dtype),
        "widths_sha256": _slim_digest(denoiser),
        "config": asdict(config),
        "model": model_digest(pipe, component),
    }


def _slim_digest(denoiser: nn.Module) -> str | None:
    """What tells a slim denoiser from others of the same dense one; None for a dense one."""
    slim, record = settings(denoiser).get("slimdiff"), getattr(denoiser, "slim_record", None)
    if not slim:
        return None
    text = json.dumps([slim, None if record is None else record.plan.recipe], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
