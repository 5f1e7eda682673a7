"""Pictures to measure on: drawn without what covers or marks them, and looked at one by one.

A safety checker puts black in the place of a picture, and two black ones are alike. So does a VAE
that overflows in half precision: NaN becomes black. Neither says anything about a denoiser.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimdiff.evaluate.sampling import outputs

COVERS = ("safety_checker", "watermark", "watermarker")
"""What pipelines call the components that cover a finished picture, or mark it."""

FAULTS = {"not_finite": "not finite", "flagged": "flagged as unsafe", "black": "wholly black"}
"""Why a picture is left out, and how that is told."""


@dataclass(frozen=True)
class Picture:
    """A picture, and why it is not measured on.

    Attributes:
        image: a PIL image; of a video, the frame in the middle.
        fault: one of `FAULTS`; None if there is none.
    """

    image: Any
    fault: str | None = None


def draw(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **sampling: Any) -> list[Picture]:
    """A picture for each prompt and its seed, drawn without safety checker and watermark.

    Args:
        pipe: a diffusers pipeline; afterwards it is as it was.
        prompts, seeds, sampling: as for `generate`, without `output_type`.
    """
    drawn: list[Picture] = []
    with uncovered(pipe):
        for output in outputs(pipe, prompts, seeds, output_type="np", **sampling):
            flags = getattr(output, "nsfw_content_detected", None)
            flags = [False] * len(output[0]) if flags is None else flags
            drawn += [_picture(item, flag) for item, flag in zip(output[0], flags, strict=True)]
    return drawn


@contextlib.contextmanager
def uncovered(pipe: Any) -> Iterator[list[str]]:
    """Inside, the pipeline has no safety checker and no watermark; yields those that it has."""
    kept = {name: vars(pipe)[name] for name in COVERS if vars(pipe).get(name) is not None}
    # A pipeline's own `__setattr__` would note in its config that the component is gone for good.
    for name in kept:
        object.__setattr__(pipe, name, None)
    try:
        yield list(kept)
    finally:
        for name, component in kept.items():
            object.__setattr__(pipe, name, component)


def fit_pairs(drawn: Mapping[str, Sequence[Picture]]) -> tuple[list[int], dict[str, Any]]:
    """Places of the pairs that can be measured on, and how many pictures of each model cannot.

    Args:
        drawn: "dense" and "slim" -> pictures of the same prompts and seeds.

    Returns:
        The places, and {"drawn": pairs, "measured": pairs, "left_out": {model: {fault: pictures}}}.
    """
    count = len(drawn["dense"])
    fit = [i for i in range(count) if not any(own[i].fault for own in drawn.values())]
    faults = {label: Counter(p.fault for p in own) for label, own in drawn.items()}
    left_out = {label: {fault: own[fault] for fault in FAULTS} for label, own in faults.items()}
    return fit, {"drawn": count, "measured": len(fit), "left_out": left_out}


def left_out_told(counted: Mapping[str, Any]) -> str:
    """Which pictures were left out, in words; empty if none was."""
    return "; ".join(
        f"{label}: {number} {FAULTS.get(fault, fault)}"
        for label, faults in counted["left_out"].items()
        for fault, number in faults.items()
        if number
    )


def _picture(item: Any, flagged: bool) -> Picture:
    """A picture of an array (height, width, channels) from 0 to 1, or of a video's frames."""
    import numpy as np
    from PIL import Image

    if isinstance(item, list) or getattr(item, "ndim", 3) == 4:
        item = item[len(item) // 2]
    if isinstance(item, Image.Image):  # of a pipeline that knows no other output
        item = np.asarray(item, dtype=np.float32) / 255
    finite = bool(np.isfinite(item).all())
    levels = (np.nan_to_num(item).clip(0, 1) * 255).round().astype("uint8")
    image = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
    faults = {"not_finite": not finite, "flagged": bool(flagged), "black": not levels.any()}
    return Picture(image, next((fault for fault, found in faults.items() if found), None))
