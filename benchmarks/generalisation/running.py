"""Slim every model under every variant and budget, row by row, and judge on unseen prompts."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import slimdiff
from generalisation.subjects import Call, Subject
from generalisation.training import CACHE
from generalisation.variants import BUDGETS, VARIANTS, split
from measuring import RESULTS, Rows
from slimdiff.denoiser import denoiser_of

NAME = "generalisation"
FIGURES = ("params", "params_dense", "macs", "macs_dense", "predicted_error", "error_on_probes")
"""Figures of a plan that a row keeps, where the plan has them."""


@dataclass(frozen=True)
class Judging:
    """How much is measured: unseen prompts, steps of their trajectories, prompts to a call."""

    prompts: int = 48
    steps: int = 10
    batch: int = 16


@dataclass
class Runner:
    """Measures rows that are not there yet.

    Attributes:
        work: statistics are kept in it, one folder for all variants that calibrate alike.
        tag: names a state of the code: its rows stand beside those of others, and what was
            recorded by another state is not taken over.
    """

    judging: Judging = Judging()
    work: Path = CACHE
    results: Path = RESULTS
    tag: str = ""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: VARIANTS)
    budgets: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: BUDGETS)

    @property
    def rows(self) -> Rows:
        """The rows, in one file."""
        return Rows(NAME, vars(self.judging), self.results)

    def run(self, name: str, load: Callable[[], Subject]) -> None:
        """All rows of one model; it is loaded, and drawn with, only if one is missing."""
        rows, calls = self.rows, None
        subject: Subject | None = None
        for key, variant, change, budget in self._wanted(name):
            if key in rows.rows:
                _check_same(key, rows.rows[key], change)
                print(f"{key}: kept", flush=True)
                continue
            subject = subject or load()
            calls = calls or subject.calls(*vars(self.judging).values())
            labels = {"model": name, "budget": budget, "variant": variant, "change": change}
            make = functools.partial(self._row, subject, calls, labels)
            rows.measure(key, make)

    def _wanted(self, name: str) -> Iterable[tuple[str, str, dict[str, Any], str]]:
        for variant, change in self.variants.items():
            label = f"{variant} @ {self.tag}" if self.tag else variant
            for budget in self.budgets:
                plain = json.loads(json.dumps(dict(change)))
                yield f"{name} | {budget} | {label}", label, plain, budget

    def _row(self, subject: Subject, calls: list[Call], labels: dict[str, Any]) -> dict[str, Any]:
        """The labels, and a slim copy's figures, or why there is none."""
        return labels | self._measured(subject, calls, labels["change"], labels["budget"])

    def _measured(
        self, subject: Subject, calls: list[Call], change: dict[str, Any], budget: str
    ) -> dict[str, Any]:
        count, calibration, how = split(change)
        sampling = subject.sampling | calibration
        config = slimdiff.CalibrationConfig(**sampling)
        pipe, texts = subject.copy_of_pipe(), subject.calibration[:count]
        if len(texts) < count:
            return {"unavailable": f"{subject.name} has {len(texts)} calibration prompts"}
        limit = slimdiff.Budget(**self.budgets[budget])
        kept = self._kept(subject.name, {"prompts": count} | sampling)
        try:
            plan = slimdiff.compress(pipe, texts, limit, config=config, checkpoint=kept, **how)
        except slimdiff.SlimdiffError as error:
            return {"unavailable": str(error)}
        slim = denoiser_of(pipe)[1].eval()
        errors = subject.errors(slim, calls, self.judging.prompts, self.judging.batch)
        figures = {name: plan.figures[name] for name in FIGURES if name in plan.figures}
        seconds = plan.figures.get("seconds", {})
        return figures | errors.record() | {"seconds": seconds}

    def _kept(self, name: str, sampling: dict[str, Any]) -> Path:
        """Where statistics of a model, sampled so, are kept."""
        text = json.dumps([self.tag, sampling], sort_keys=True)
        return self.work / "statistics" / name / hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_same(key: str, row: Mapping[str, Any], change: Mapping[str, Any]) -> None:
    """Refuse to mix rows of two definitions of a variant.

    Raises:
        ValueError: the row was measured with other arguments.
    """
    if row["change"] != change:
        raise ValueError(
            f"{key}: measured with {row['change']}, the variant is {change} now; name it otherwise"
        )
