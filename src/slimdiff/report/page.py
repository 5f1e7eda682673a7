"""The page: what is on it from top to bottom."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files

from slimdiff.report import facts, figures, frontier, lines, plots, tables
from slimdiff.report.gallery import gallery
from slimdiff.report.html import Html, join, scrolling, section, tag, text
from slimdiff.report.made import made, made_of, to_repeat
from slimdiff.report.names import METRICS, figure_name, kind_colour, kind_name
from slimdiff.results import Results

COMPRESS, EVALUATE = "slimdiff compress", "slimdiff evaluate"


def render(results: Results) -> str:
    """The report of results as one HTML file that loads nothing.

    Raises:
        SlimdiffError: results lack what the schema asks for, or matplotlib is not installed.
    """
    parts = {
        "frontier": ("The frontier", _frontier(results), None),
        "images": ("Images", _images(results), EVALUATE),
        "cost": ("Where parameters and MACs went", _where(results), COMPRESS),
        "plan": ("The plan", _plan(results), COMPRESS),
        "curves": ("What each width would cost", _curves(results), COMPRESS),
        "error": ("Velocity error", _error(results), EVALUATE),
        "figures": ("All figures", figures.figures(results), EVALUATE),
        "groups": ("All groups", _groups(results), COMPRESS),
        "made": ("How it was made", _made(results), COMPRESS),
    }
    shown = {name: (title, body) for name, (title, body, _) in parts.items() if body is not None}
    absent = [(title, command) for title, body, command in parts.values() if body is None]
    links = [tag("a", title, href=f"#{name}") for name, (title, _) in shown.items()]
    body = tag(
        "body",
        _header(results, absent),
        tag("nav", *links, aria_label="Parts of this page") if links else None,
        tag("main", *(section(name, title, part) for name, (title, part) in shown.items())),
        tag("footer", "Written by ", tag("code", "slimdiff report"), " from results alone."),
        tag("script", _resource("page.js")),
    )
    return f"<!doctype html>\n{tag('html', _head(results), body, lang='en')}\n"


def _left_out(results: Results, titles: Sequence[tuple[str, str | None]]) -> list[Html]:
    """What is not on the page, where the results of the command that tells it were not given."""
    given = {
        COMPRESS: any("calibration" in part for part in made_of(results)),
        EVALUATE: "fidelity" in results,
    }
    found = []
    for command in (command for command in given if not given[command]):
        names = ", ".join(title[0].lower() + title[1:] for title, of in titles if of == command)
        told = ("Without results of ", tag("code", command), f", this page lacks: {names}.")
        found += [tag("p", *told, class_="missing")] if names else []
    return [] if facts.is_frontier(results) else found


def _head(results: Results) -> Html:
    """Name, style and a policy that lets the page load nothing and run its own script alone."""
    digest = hashlib.sha256(_resource("page.js").encode()).digest()
    script = f"script-src 'sha256-{base64.b64encode(digest).decode()}'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; {script}"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=Html(policy)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{facts.title(results)}: slimdiff report"),
        tag("link", rel="icon", href="data:,"),
        tag("style", _resource("page.css")),
    )


def _resource(name: str) -> Html:
    return Html(files("slimdiff.report").joinpath(name).read_text(encoding="utf-8"))


def _header(results: Results, absent: Sequence[tuple[str, str | None]]) -> Html:
    return tag(
        "header",
        tag("button", "dark", type="button", id="theme", hidden=True),
        tag("p", "slimdiff report", class_="muted"),
        tag("h1", facts.title(results)),
        *(tag("p", told, class_="warning", role="alert") for told in facts.warnings(results)),
        tag("p", _unbroken(facts.summary(results)), class_="summary"),
        figures.key_figures(results),
        *_left_out(results, absent),
    )


def _unbroken(sentence: str) -> Html:
    """Text whose figures with an exponent stay on one line."""
    return Html(re.sub(r"[\d.]+e-\d+", r'<span class="figure">\g<0></span>', text(sentence)))


def _frontier(results: Results) -> Html | None:
    if "frontier" not in results:
        return None
    told = (
        "Velocity error of plans from dense down to the smallest widths: the line is predicted, "
        "dots were measured on probes (inputs that calibration kept), the ring marks the knee."
    )
    charts = [_chart(name, frontier.drawing(results, axis)) for axis, name in frontier.AXES.items()]
    return join((tag("p", told), tag("div", *charts, class_="charts")))


def _images(results: Results) -> Html | None:
    images = results.get("images")
    if not images:
        return None
    told = (
        "The same prompts and the same seeds, through the dense pipeline and the slim one. In the "
        "difference, black is none."
    )
    return join((tag("p", told), gallery(images)))


def _where(results: Results) -> Html | None:
    if not facts.groups_of(results):
        return None
    charts = [
        _chart(f"{name[0].upper()}{name[1:]}", plots.where_it_went(results, metric))
        for metric, name in METRICS.items()
    ]
    told = tag("p", "Each pair of bars is dense (pale) above slim (full). ", _legend(results))
    return join((told, tag("div", *charts, class_="charts"), tables.where_it_went(results)))


def _legend(results: Results) -> Html:
    kinds = facts.kinds_of(facts.groups_of(results))
    shown = [*kinds, "rest"] if "rest" in results else kinds
    entries = [(f"var(--{kind_colour(kind, kinds)})", kind_name(kind)) for kind in shown]
    return tag("span", *(tag("span", _swatch(c), name) for c, name in entries), class_="legend")


def _swatch(colour: str) -> Html:
    return tag("i", style=f"background:{colour}")


def _chart(caption: object, drawing: Html, wide: bool = False) -> Html:
    shown = scrolling(drawing, "Plot, scrolls sideways") if wide else drawing
    return tag("figure", tag("figcaption", caption), shown, class_="chart")


def _plan(results: Results) -> Html | None:
    spans = [
        tag("span", f"{name} ", tag("b", value))
        for name, value in facts.plan_facts(results).items()
    ]
    told = tag("p", *spans, class_="told") if spans else None
    if not facts.groups_of(results):
        return told
    caption = (
        "Width of every group along the network: outlined what the dense model has, filled what "
        "stays. Groups of one part of the network stand side by side, in the order of its layers."
    )
    return join((told, _chart(caption, plots.plan(results), wide=True)))


def _curves(results: Results) -> Html | None:
    charts = [_chart(kind_name(kind), drawing) for kind, drawing in lines.curves(results).items()]
    if not charts:
        return None
    probed = any(group.get("gain") is not None for group in facts.groups_of(results))
    figures = (results.get("plan") or {}).get("figures") or {}
    known = figure_name("predicted_error", figures)
    whose = known if probed else "error of the group's own output, predicted"
    told = (
        f"{whose[0].upper()}{whose[1:]}, by the share of its width that a group keeps. One line "
        f"for each group; the dot is the width that was chosen. A group that keeps all of its "
        f"width has no error and no dot."
    )
    rows = "charts" if len(charts) in lines.IN_HALVES else "charts thirds"
    return join((tag("p", told), tag("div", *charts, class_=rows)))


def _error(results: Results) -> Html | None:
    drawings = {
        "By timestep": lines.by_timestep(results),
        "By number of calibration prompts": lines.by_prompts(results),
    }
    charts = [_chart(caption, drawing) for caption, drawing in drawings.items() if drawing]
    told = (
        "Squared difference of slim and dense predictions over the square of the dense ones, on "
        "the inputs that the dense pipeline's own sampling passes through."
    )
    if charts:
        return join((tag("p", told), tag("div", *charts, class_="charts")))
    measured = facts.measured(results, "fidelity", "velocity")
    return tag("p", "None: every prediction is as it was.") if measured else None


def _groups(results: Results) -> Html | None:
    return tables.groups(results) if facts.groups_of(results) else None


def _made(results: Results) -> Html | None:
    parts = made_of(results)
    if not parts:
        return None
    return join((made(results), tag("h3", "To repeat it"), to_repeat(parts)))
