"""HTML in which every text is escaped unless it was made by these functions."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = {"br", "img", "input", "link", "meta"}


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: object) -> Html:
    """Markup as it is; anything else escaped."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Parts one after the other; None is left out."""
    return Html(between.join(text(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element; `class_` and `aria_label` are `class` and `aria-label`.

    An attribute that is True has no value, one that is None or False is left out.
    """
    pairs = [
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    ]
    opening = f"<{name}{''.join(pairs)}>"
    return Html(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def section(identity: str, title: str, *children: object) -> Html:
    """A part of the page under a heading that can be linked to."""
    heading = tag("h2", title, id=f"{identity}-title")
    return tag(
        "section", heading, *children, "\n", id=identity, aria_labelledby=f"{identity}-title"
    )


def scrolling(child: Html, label: str) -> Html:
    """What may be wider than a phone: it scrolls in a box of its own."""
    return tag("div", child, class_="scroll", role="region", aria_label=label, tabindex="0")


def table(head: Iterable[object], rows: Iterable[Iterable[object]], label: str) -> Html:
    """A table whose first column names the row; a row of one cell is a heading inside the table."""
    headers = [tag("th", cell, scope="col") for cell in head]
    body = [_row(list(cells), len(headers)) for cells in rows]
    made = tag("table", tag("thead", tag("tr", *headers)), tag("tbody", *body))
    return scrolling(made, label)


def _row(cells: list[object], columns: int) -> Html:
    if len(cells) == 1:
        return tag("tr", tag("th", cells[0], colspan=columns, scope="rowgroup"), class_="part")
    first, *others = cells
    return tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in others))
