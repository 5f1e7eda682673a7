"""What is compared: named changes to how a model is slimmed, as keyword arguments."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import slimdiff

BASE: dict[str, Any] = {"prompts": 256, "batch_size": 16}
"""What every variant begins at, besides the library's defaults."""

BASELINE = "defaults"
PLAIN = ("attention", "feed_forward", "resnet", "modulation")
VARIANTS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "no projections": {"layers": PLAIN},
    "no removal": {"remove_layers": False},
    "no projections, no removal": {"layers": PLAIN, "remove_layers": False},
    "no refit": {"refit": False},
    "always refit": {"refit": True},
    "64 prompts, all 20 steps": {"prompts": 64, "steps_per_prompt": None},
    "512 prompts": {"prompts": 512},
    "64 probes": {"num_probes": 64},
    "untied widths": {"tied": False},
    "early steps count more": {"timestep_weights": "log"},
}
"""Variant -> keyword arguments of `slimdiff.compress` and of `slimdiff.CalibrationConfig`, and
`prompts`, how many calibration prompts are used."""

BUDGETS: dict[str, dict[str, float]] = {
    "params 0.65": {"params": 0.65},
    "params 0.5": {"params": 0.5},
    "macs 0.65": {"macs": 0.65},
    "macs 0.5": {"macs": 0.5},
}
"""Arguments of `slimdiff.Budget`."""


def split(change: Mapping[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """A variant's prompts, its arguments of CalibrationConfig, and those of `compress`.

    Raises:
        KeyError: an argument that neither knows.
    """
    whole = BASE | dict(change)
    count = whole.pop("prompts")
    calibration = {field.name for field in fields(slimdiff.CalibrationConfig)}
    known = set(inspect.signature(slimdiff.compress).parameters)
    if strange := sorted(set(whole) - calibration - known):
        raise KeyError(f"{strange[0]}: neither compress nor CalibrationConfig takes it")
    config = {name: value for name, value in whole.items() if name in calibration}
    return count, config, {name: value for name, value in whole.items() if name not in calibration}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Variants of a JSON file: an object of objects."""
    return json.loads(path.read_text(encoding="utf-8"))
