"""Pairs of images, dense and slim: side by side, under a slider, or as their difference."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from slimdiff.errors import SlimdiffError
from slimdiff.report.html import Html, join, tag

SMALL = 256  # pixels; images of less width are enlarged without smoothing
AMPLIFICATION = 16  # of the difference; as in the style sheet
VIEWS = {
    "side": "side by side",
    "slider": "slider",
    "difference": f"difference \N{MULTIPLICATION SIGN}{AMPLIFICATION}",
}


def gallery(images: Sequence[Mapping[str, Any]]) -> Html:
    """All pairs, with a choice of how they are shown.

    Raises:
        SlimdiffError: an image is not a PNG in base64.
    """
    pairs = tag(
        "div", *(_pair(number, image) for number, image in enumerate(images)), class_="pairs"
    )
    choices = [
        part
        for name, told in VIEWS.items()
        for part in (
            tag("input", type="radio", name="view", id=f"view-{name}", checked=name == "side"),
            tag("label", told, for_=f"view-{name}"),
        )
    ]
    return tag("div", *choices, pairs, class_="gallery", role="group", aria_label="Images")


def _pair(number: int, image: Mapping[str, Any]) -> Html:
    told = f"{image['prompt']} (seed {image['seed']})"
    shots = join(_shot(number, image, model, told) for model in ("dense", "slim"))
    divider = tag(
        "input",
        type="range",
        min=0,
        max=100,
        value=50,
        aria_label=f"Dense left of the divider, slim right of it: {told}",
    )
    seed = tag("span", f"seed {image['seed']}", class_="muted")
    caption = tag("figcaption", image["prompt"], " ", seed)
    frame = tag("div", shots, tag("span", class_="divider"), divider, class_="frame")
    return tag("figure", frame, caption)


def _shot(number: int, image: Mapping[str, Any], model: str, told: str) -> Html:
    width, height = png_size(image[model], f"{model} image {number}")
    picture = tag(
        "img",
        src=f"data:image/png;base64,{image[model]}",
        width=width,
        height=height,
        alt=f"{model}: {told}",
        class_="pixels" if width < SMALL else None,
    )
    return tag("div", tag("span", model), picture, class_=f"shot {model}")


def png_size(data: str, name: str) -> tuple[int, int]:
    """Width and height of a PNG in base64.

    Raises:
        SlimdiffError: it is none.
    """
    try:
        start = base64.b64decode(data, validate=True)[:24]
        signature, width, height = struct.unpack(">8s8x2I", start)
    except (binascii.Error, struct.error, TypeError, ValueError) as error:
        raise SlimdiffError(f"{name} of the results is not a PNG in base64 ({error})") from error
    if signature != b"\x89PNG\r\n\x1a\n":
        raise SlimdiffError(f"{name} of the results is not a PNG; expected a PNG in base64")
    return width, height
