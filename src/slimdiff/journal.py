"""What a compression writes down about itself: seconds, accounts and pictures, as results."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slimdiff import accounting, costs
from slimdiff.budget import Saving
from slimdiff.config import CalibrationConfig
from slimdiff.curves import ErrorCurve
from slimdiff.denoiser import component_of
from slimdiff.evaluate.pictures import Picture, draw, fit_pairs, left_out_told
from slimdiff.families import groups_of
from slimdiff.picture import base64_png
from slimdiff.plan import Plan
from slimdiff.results import Results, called, made_by, write
from slimdiff.statistics import Statistics
from slimdiff.stored import round_, saved_dtypes

Progress = Callable[[str, int, int], None]

logger = logging.getLogger(__name__)


@dataclass
class Journal:
    """The journal of one compression of a pipeline.

    Attributes:
        pipe: the pipeline, dense at first.
        prompts: its calibration prompts.
        config: how it is sampled.
        results: file to write to; None writes nothing.
        pictures: image pairs to draw.
        settings: of the compression, as `slimdiff.compress` takes them.
        component: what shrinks, if not the denoiser.
        saving: in which dtypes it will be saved, where they are not those that it runs in.
        seconds: stage -> seconds.
        images: "dense" and "slim" -> pictures of the first prompts.
        sections: of the results, as far as they are known.
        done: stages that had something to do.
    """

    pipe: Any
    prompts: list[str]
    config: CalibrationConfig
    results: str | Path | None
    pictures: int
    settings: Mapping[str, Any]
    component: str | None = None
    saving: Saving = field(default_factory=Saving)
    seconds: dict[str, float] = field(default_factory=dict)
    images: dict[str, list[Picture]] = field(default_factory=dict)
    sections: Results = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    def begin(self, progress: Progress | None) -> Progress:
        """Draw what the pipeline draws before anything is changed; see `noting`."""
        self.draw("dense")
        return self.noting(progress)

    def noting(self, progress: Progress | None) -> Progress:
        """`progress`, and a note of the stages that reported any."""

        def note(stage: str, count: int, total: int) -> None:
            self.done.add(stage)
            if progress is not None:
                progress(stage, count, total)

        return note

    @property
    def reused(self) -> list[str]:
        """What was not done again: statistics and curves were there from an earlier run."""
        kept = {"calibrate": {"calibrate"}, "allocate": {"probe", "decompose"}}
        return [s for s in self.seconds if s in kept and not kept[s] & self.done]

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Note the seconds spent inside."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 2)

    def draw(self, label: str) -> None:
        """Draw the first prompts with the pipeline as it stands."""
        texts = self.prompts[: self.pictures]
        if texts:
            self.images[label] = draw(self.pipe, texts, range(len(texts)), **self.config.sampling)

    def round(self) -> None:
        """Give the slim denoiser the weights that it will have once saved: errors are of these.

        Raises:
            SlimdiffError: a number is beyond what its stored dtype holds.
        """
        denoiser = component_of(self.pipe, self.component)[1]
        round_(denoiser, saved_dtypes(denoiser, self.saving.dtypes))

    def account(self, statistics: Statistics, plan: Plan, curves: Mapping[str, ErrorCurve]) -> None:
        """Note where parameters and MACs are, while the denoiser is still dense."""
        if self.results is None:
            return
        denoiser = component_of(self.pipe, self.component)[1]
        groups = groups_of(denoiser)
        found = costs.measure(denoiser, groups, statistics.probes.batches(1)[0], plan.fused)
        self.sections |= accounting.account(groups, found, plan.entries, curves)
        self.sections["model"] = {
            "dense": Path(str(getattr(self.pipe, "name_or_path", None) or "dense")).name,
            "slim": "slim",
            "class": type(denoiser).__name__,
        }

    def write(self, plan: Plan) -> None:
        """Write the results, if they were asked for."""
        if self.results is None:
            return
        names = ("recipe", "allocation", "budget", "figures")
        how = {"calibration": asdict(self.config), "prompts": len(self.prompts)}
        fit, counted = self._fit_pictures()
        how |= {"pictures": counted}
        self.sections |= {
            "made": made_by(self._call(), **how),
            "plan": {name: getattr(plan, name) for name in names},
            "images": [
                {"prompt": self.prompts[i], "seed": i}
                | {label: base64_png(own[i].image) for label, own in self.images.items()}
                for i in fit
            ],
        }
        write(self.results, self.sections)

    def _fit_pictures(self) -> tuple[list[int], dict[str, Any]]:
        """Places of the pairs that are shown, and a count of those that are not."""
        if not self.images:
            return [], {}
        fit, counted = fit_pairs(self.images)
        if told := left_out_told(counted):
            logger.warning("warning: pictures that the report leaves out: %s", told)
        return fit, counted

    def _call(self) -> str:
        """What to type in Python for the same again."""
        by_hand = self.settings["budget"] is None
        given = ["pipe", "prompts", *(["plan=plan"] if by_hand else [])]
        finishing = {name: self.settings[name] for name in ("refit", "heal")}
        chosen: dict[str, Any] = finishing if by_hand else dict(self.settings)
        kept = {"results": Path(self.results).name if self.results else None}
        chosen = chosen | ({"component": self.component} if self.component else {})
        settings = {**chosen, "config": self.config, **kept, "pictures": self.pictures}
        return called("slimdiff", "compress", given, **settings)
