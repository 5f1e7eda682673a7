"""Figures of matplotlib as SVG inside a page: in the page's colours and font, with tooltips."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from slimdiff.errors import SlimdiffError
from slimdiff.report.html import Html, tag, text
from slimdiff.report.names import KIND_COLOURS

# Stand-ins for the page's colours, which follow the light or dark theme.
COLOURS = {
    name: f"#0{number:x}0b0c"
    for number, name in enumerate(
        ("ink", "muted", "line", "rest", "accent", *(f"kind-{i}" for i in range(KIND_COLOURS))),
        start=1,
    )
}
POINT = 1 / 72  # inches; one unit of an SVG's own coordinates

Tooltips = Mapping[str, str]
Paint = Callable[[Any], Tooltips]

_SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "slimdiff",
    "svg.fonttype": "none",
    "font.size": 12,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.7,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "figure.constrained_layout.use": True,
}


def drawn(prefix: str, label: str, size: tuple[float, float], paint: Paint) -> Html:
    """The SVG of what `paint` draws on a figure.

    Args:
        prefix: distinguishes the ids of this figure from those of the page's others.
        label: what the figure shows, for who does not see it.
        size: width and height in CSS pixels.
        paint: draws on a matplotlib figure; returns tooltips by the `gid` of what was drawn.

    Raises:
        SlimdiffError: matplotlib is not installed.
    """
    with _matplotlib() as figure_of:
        figure = figure_of(figsize=(size[0] * POINT, size[1] * POINT))
        tooltips = paint(figure)
        written = io.StringIO()
        unwritten = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=unwritten)
    return inline(written.getvalue(), prefix, label, tooltips)


@contextmanager
def _matplotlib() -> Iterator[Any]:
    """matplotlib's figure, in slimdiff's style whatever the user's settings are."""
    try:
        from matplotlib import rc_context, rcdefaults, rcParams
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SlimdiffError(
            "the report's plots need matplotlib: pip install 'slimdiff[plot]'"
        ) from error
    with rc_context():
        rcdefaults()
        rcParams.update(_SETTINGS)
        yield Figure


def inline(svg: str, prefix: str, label: str, tooltips: Tooltips) -> Html:
    """The SVG as a part of a page: its ids prefixed, its colours and font those of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    width, height = re.findall(r'viewBox="0 0 (\S+) (\S+)"', svg)[0]
    opening = tag(
        "svg",
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=label,
        style=f"max-width:{1.3 * float(width):.0f}px",
    ).removesuffix("</svg>")
    svg = re.sub(r"<svg.*?>", lambda _: opening, svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"font: [^\"]*?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    for identity, told in tooltips.items():
        place = f'<g id="{identity}">'
        svg = svg.replace(place, f"{place}<title>{text(told)}</title>")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    return Html(re.sub(r"\s*\n\s*", " ", svg).replace("> <", "><"))
