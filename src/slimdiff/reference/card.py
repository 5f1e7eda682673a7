"""The model card of a bundled reference pipeline, written from what was measured."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from slimdiff.reference.accuracy import Accuracy
from slimdiff.reference.build import parameters_of
from slimdiff.reference.contract import Reference
from slimdiff.reference.state import Progress

STEPS = 20


@dataclass(frozen=True)
class Figures:
    """What the model card reports; `test` has a row for each way to call the pipeline."""

    progress: Progress
    judge: Accuracy
    autoencoder: Accuracy
    test: dict[str, Accuracy]

    def record(self) -> dict[str, Any]:
        """The figures as JSON; "test" and "prompts" are of the first way to call it."""
        first, *others = self.test
        return {
            **vars(self.progress),
            "prompts": self.test[first].n,
            "judge": _values(self.judge),
            "autoencoder": _values(self.autoencoder),
            "test": _values(self.test[first]),
            **({"others": {k: _values(self.test[k]) for k in others}} if others else {}),
        }


def _values(accuracy: Accuracy) -> dict[str, float]:
    return {**accuracy.shares, **accuracy.means}


CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
---

# {name}

A small but real `{pipeline}`, bundled with slimdiff so that compression can be tried,
tested and measured without a download. {drawn}

    {example}

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

{sampling_steps} steps of {scheduler}, guidance {guidance:g}, on prompts of the test split: share of
images that the judge finds right, in brackets the 95 % interval of the whole.

{rows}

{right}
{credits}"""


def card(
    name: str, kind: Reference, pipe: Any, figures: Figures, machine: str, note: str = ""
) -> str:
    """The model card of the reference `name`, trained on `machine`, with a paragraph `note`."""
    rows = {
        **figures.test,
        "renders through the autoencoder": figures.autoencoder,
        "renders themselves (the judge)": figures.judge,
    }
    told, own = kind.world.told, next(iter(kind.sampling.values()))
    options = {"num_inference_steps": STEPS} | own
    training = [_training(name, kind, figures.progress, machine), note, told.unseen]
    return CARD.format(
        name=name,
        pipeline=type(pipe).__name__,
        drawn=_fill(told.drawn),
        example=told.example,
        parts="\n".join(_part(pipe, *part) for part in kind.describe(pipe).items()),
        absent="".join(f", {component}=None" for component in _absent(pipe)),
        options=", ".join(f"{key}={value!r}" for key, value in options.items()),
        training="\n\n".join(_fill(part) for part in training if part),
        sampling_steps=STEPS,
        scheduler=type(pipe.scheduler).__name__,
        guidance=own["guidance_scale"],
        rows="\n".join(_table(rows)),
        right=_fill(told.right),
        credits=f"\n## Credits\n\n{_fill(told.credits)}\n" if told.credits else "",
    )


def _training(name: str, kind: Reference, progress: Progress, machine: str) -> str:
    p, minutes = progress, progress.seconds / 60
    return (
        f"`python -m slimdiff.reference.train --reference {name}`: {p.samples:,} samples in "
        f"{p.step:,} steps, {minutes:.0f} minutes on {machine}, after a few minutes for the parts "
        f"before it. {kind.training}"
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


def _table(rows: dict[str, Accuracy]) -> list[str]:
    """A line for each row, below the names of attributes and measures."""
    first = next(iter(rows.values()))
    names = ["", *first.shares, *first.graded, "n"]
    lines = [names, ["---"] * len(names), *([label, *_cells(row)] for label, row in rows.items())]
    return [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines]


def _cells(accuracy: Accuracy) -> list[str]:
    low, high = accuracy.interval
    shares = [f"{100 * share:.1f} %" for share in accuracy.shares.values()]
    shares[-1] += f" ({100 * low:.1f} to {100 * high:.1f})"
    return [*shares, *(f"{mean:.3f}" for mean in accuracy.means.values()), str(accuracy.n)]
