"""Fidelity: how alike the slim pipeline's predictions and pictures are to the dense one's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slimdiff.errors import SlimdiffError
from slimdiff.evaluate.distances import features_of, frechet, kernel
from slimdiff.evaluate.features import ClipScore, Features
from slimdiff.evaluate.pictures import left_out_told
from slimdiff.evaluate.velocity import VelocityError
from slimdiff.metrics import image_tensor, psnr, ssim

Judge = Callable[[Sequence[Any], Sequence[str]], dict[str, Any]]
"""(images, prompts) -> {"whole", "interval", "attributes", "count"}."""


@dataclass(frozen=True)
class Drawn:
    """Pictures of both pipelines at the same prompts and seeds, and the velocity error on the way.

    Attributes:
        prompts, seeds, dense, slim: those of the pairs that can be measured on.
        velocity: of all prompts.
        counted: as `pictures.fit_pairs` counts the pairs.
    """

    prompts: list[str]
    seeds: list[int]
    dense: list[Any]
    slim: list[Any]
    velocity: VelocityError
    counted: dict[str, Any]


def measure_fidelity(
    drawn: Drawn, features: Features | None, clip: ClipScore | None, judge: Judge | None
) -> dict[str, Any]:
    """The section `fidelity` of results; what cannot be measured says why."""
    return {
        "velocity": _or_why(lambda: _velocity(drawn)) | {"prompts": drawn.counted["drawn"]},
        "pictures": drawn.counted,
        "images": _or_why(lambda: _likeness(drawn)),
        **_distances(drawn, features),
        "clip": _or_why(lambda: _clip(drawn, clip)),
        "scenes": _or_why(lambda: _scenes(drawn, judge)),
    }


def _velocity(drawn: Drawn) -> dict[str, Any]:
    error = drawn.velocity.relative
    if not math.isfinite(error):
        raise SlimdiffError(
            f"the error of the predictions is {error}: a denoiser puts out NaN or infinity; try "
            f"--dtype float32 or bfloat16"
        )
    by_timestep = [[step, error] for step, error in drawn.velocity.by_timestep.items()]
    return {"relative": error, "by_timestep": by_timestep}


def _likeness(drawn: Drawn) -> dict[str, Any]:
    _refuse_none(drawn)
    likeness = {"psnr": psnr(drawn.slim, drawn.dense), "ssim": ssim(drawn.slim, drawn.dense)}
    return likeness | {"count": len(drawn.prompts)}


def _refuse_none(drawn: Drawn) -> None:
    """Raise where no pair is left to measure on."""
    if not drawn.prompts:
        raise SlimdiffError(
            f"no pair of pictures is left to measure on ({left_out_told(drawn.counted)}); where "
            f"they are not finite, try --dtype float32 or bfloat16"
        )


def _distances(drawn: Drawn, features: Features | None) -> dict[str, Any]:
    names: dict[str, Callable[..., float]] = {"frechet": frechet, "kernel": kernel}
    if not drawn.prompts:
        return {name: _or_why(lambda: _likeness(drawn)) for name in names}
    if features is None:
        reason = "the pipeline has no VAE encoder whose features could be used; give --features"
        return {name: {"unavailable": reason} for name in names}
    dense_nd, slim_nd = (
        features_of(image_tensor(images), features) for images in (drawn.dense, drawn.slim)
    )
    dimensions = dense_nd.shape[1]
    base = {"features": features.label, "count": len(drawn.prompts), "dimensions": dimensions}

    def measured(distance: Callable[..., float]) -> dict[str, Any]:
        return _or_why(lambda: {"value": distance(slim_nd, dense_nd)} | base)

    return {name: measured(distance) for name, distance in names.items()}


def _clip(drawn: Drawn, clip: ClipScore | None) -> dict[str, Any]:
    if clip is None:
        raise SlimdiffError("no CLIP model was given; give the folder of one with --clip")
    _refuse_none(drawn)
    dense, slim = (
        clip(image_tensor(images), drawn.prompts) for images in (drawn.dense, drawn.slim)
    )
    return {"dense": dense, "slim": slim, "model": clip.label, "count": len(drawn.prompts)}


def _scenes(drawn: Drawn, judge: Judge | None) -> dict[str, Any]:
    if judge is None:
        raise SlimdiffError(
            "there is no judge of these pictures; the bundled reference's test prompts have one"
        )
    _refuse_none(drawn)
    return {
        "dense": judge(drawn.dense, drawn.prompts),
        "slim": judge(drawn.slim, drawn.prompts),
    }


def _or_why(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measure()
    except SlimdiffError as error:
        return {"unavailable": str(error)}
