"""The model card of a bundled reference pipeline, written from what was measured."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from slimdiff.reference.build import parameters_of
from slimdiff.reference.contract import Reference
from slimdiff.reference.judge import SceneAccuracy
from slimdiff.reference.scenes import SIDE
from slimdiff.reference.state import Progress

STEPS = 20
GUIDANCE = 3.0


@dataclass(frozen=True)
class Figures:
    """What the model card reports; `test` has a row for each way to call the pipeline."""

    progress: Progress
    judge: SceneAccuracy
    autoencoder: SceneAccuracy
    test: dict[str, SceneAccuracy]

    def record(self) -> dict[str, Any]:
        """The figures as JSON; "test" and "prompts" are of the first way to call it."""
        first, *others = self.test
        return {
            **vars(self.progress),
            "prompts": self.test[first].n,
            "judge": self.judge.shares,
            "autoencoder": self.autoencoder.shares,
            "test": self.test[first].shares,
            **({"others": {k: self.test[k].shares for k in others}} if others else {}),
        }


CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
---

# {name}

A small but real `{pipeline}`, bundled with slimdiff so that compression can be tried,
tested and measured without a download. It draws scenes of one or two objects on a lit background,
{side} by {side} pixels, from captions such as

    a large red circle top left and a small blue ring bottom right on navy background

| part | what | parameters |
|---|---|---|
{parts}

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder{absent})
options = dict({options})
image = pipe(caption, **options).images[0]
```

## Training

{training}

## Measured

Share of images that the judge finds right, prompts of the test split (n in the last column),
{sampling_steps} steps of {scheduler}, guidance {guidance}:

| | background | colour | shape | size | position | **whole scene** | 95 % interval |
|---|---|---|---|---|---|---|---|
{rows}

Colour, shape and size count as right when they are so for every object of the image and no object
is missing or too many; "whole scene" is everything at once.
"""


def card(name: str, kind: Reference, pipe: Any, figures: Figures, note: str = "") -> str:
    """The model card of the reference `name`, with a paragraph `note` on its training."""
    rows = {
        **figures.test,
        "renders through the autoencoder": figures.autoencoder,
        "renders themselves (the judge)": figures.judge,
    }
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    options |= next(iter(kind.sampling.values()))
    return CARD.format(
        name=name,
        pipeline=type(pipe).__name__,
        side=SIDE,
        parts="\n".join(_part(pipe, *part) for part in kind.describe(pipe).items()),
        absent="".join(f", {component}=None" for component in _absent(pipe)),
        options=", ".join(f"{key}={value!r}" for key, value in options.items()),
        training=_training(name, kind, figures.progress) + (f"\n\n{_fill(note)}" if note else ""),
        sampling_steps=STEPS,
        scheduler=type(pipe.scheduler).__name__,
        guidance=GUIDANCE,
        rows="\n".join(f"| {label} | {_row(accuracy)} |" for label, accuracy in rows.items()),
    )


def _training(name: str, kind: Reference, progress: Progress) -> str:
    p, minutes = progress, progress.seconds / 60
    return _fill(
        f"`python -m slimdiff.reference.train --reference {name}`: {p.samples:,} samples in "
        f"{p.step:,} steps, {minutes:.0f} minutes on two CPU cores that did other work too, after "
        f"a few minutes for the parts before it. {kind.training} No caption of the test, selection "
        f"or calibration split was trained on, in either order of its objects."
    )


def _fill(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _part(pipe: Any, component: str, what: str) -> str:
    part = getattr(pipe, component)
    size = f"{parameters_of(part):.2f} M " if hasattr(part, "parameters") else ""
    return f"| `{component}` | {what} | {size}|"


def _absent(pipe: Any) -> list[str]:
    """Components that it has not, and that diffusers wants to be told of."""
    optional = type(pipe)._optional_components
    return [name for name, part in pipe.components.items() if part is None and name not in optional]


def _row(accuracy: SceneAccuracy) -> str:
    low, high = accuracy.interval
    cells = [f"{100 * share:.1f} %" for share in accuracy.shares.values()]
    return " | ".join([*cells, f"{100 * low:.1f} to {100 * high:.1f} (n = {accuracy.n})"])
