"""A picture of images side by side, with labels; PIL only."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slimdiff.errors import SlimdiffError

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST_CELL = 160  # pixels; smaller images are enlarged by a whole factor
GAP, LINE, FONT_SIZE = 8, 18, 14
INK, PAPER = (30, 30, 30), (255, 255, 255)


def image_grid(rows: Mapping[str, Sequence[Image]], prompts: Sequence[str]) -> Image:
    """Images in labelled rows, one column per prompt, the prompt above its column.

    Args:
        rows: row label -> images of one size, such as {"dense": [...], "slim": [...]}; drawn from
            top to bottom in that order.
        prompts: one per column.

    Raises:
        SlimdiffError: no image, or a row that has not one image for each prompt.
    """
    from PIL import Image as pil

    _check(rows, prompts)
    cells = {label: [_enlarged(image) for image in row] for label, row in rows.items()}
    width, height = next(iter(cells.values()))[0].size
    captions = [_wrapped(prompt, width) for prompt in prompts]
    left = 2 * GAP + max(_length(label) for label in rows)
    top = 2 * GAP + LINE * max(len(lines) for lines in captions)
    size = left + len(prompts) * (width + GAP), top + len(rows) * (height + GAP)
    canvas = pil.new("RGB", size, PAPER)
    for column, lines in enumerate(captions):
        _write(canvas, left + column * (width + GAP), GAP, lines)
    for number, (label, row) in enumerate(cells.items()):
        y = top + number * (height + GAP)
        _write(canvas, GAP, y, [label])
        for column, image in enumerate(row):
            canvas.paste(image, (left + column * (width + GAP), y))
    return canvas


def base64_png(image: Image) -> str:
    """An image as base64 of its PNG file, for JSON and HTML."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _check(rows: Mapping[str, Sequence[Image]], prompts: Sequence[str]) -> None:
    if not rows or not prompts:
        raise SlimdiffError(f"{len(rows)} rows and {len(prompts)} prompts: expected at least one")
    for label, row in rows.items():
        if len(row) != len(prompts):
            raise SlimdiffError(
                f"row {label!r} has {len(row)} images for {len(prompts)} prompts; expected one each"
            )


def _enlarged(image: Image) -> Image:
    factor = max(1, -(-SMALLEST_CELL // image.width))
    size = image.width * factor, image.height * factor
    return image.convert("RGB").resize(size, resample=0)


def _wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels, broken at blanks; a longer word stays whole."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _length(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _write(canvas: Image, x: int, y: int, lines: Sequence[str]) -> None:
    from PIL.ImageDraw import Draw

    for number, line in enumerate(lines):
        Draw(canvas).text((x, y + number * LINE), line, fill=INK, font=_font())


def _length(text: str) -> int:
    return int(_font().getlength(text)) + 1


def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(FONT_SIZE)
