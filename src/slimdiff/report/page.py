"""The page: what is on it from top to bottom."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from slimdiff.report import facts, figures, frontier, lines, plots, tables
from slimdiff.report.gallery import gallery
from slimdiff.report.html import Html, join, missing, scrolling, section, tag, text
from slimdiff.report.made import made, made_of, to_repeat
from slimdiff.results import Results

COMPRESS, EVALUATE = "slimdiff compress", "slimdiff evaluate"


def render(results: Results) -> str:
    """The report of results as one HTML file that loads nothing.

    Raises:
        SlimdiffError: results lack what the schema asks for, or matplotlib is not installed.
    """
    sections = {
        **_frontier(results),
        "images": ("Images", _images(results)),
        "cost": ("Where parameters and MACs went", _where(results)),
        "plan": ("The plan", _plan(results)),
        "curves": ("What each width would cost", _curves(results)),
        **_measured(results),
        "groups": ("All groups", _groups(results)),
        "made": ("How it was made", _made(results)),
    }
    links = [tag("a", title, href=f"#{name}") for name, (title, _) in sections.items()]
    body = tag(
        "body",
        _header(results),
        tag("nav", *links, aria_label="Parts of this page"),
        tag("main", *(section(name, title, part) for name, (title, part) in sections.items())),
        tag("footer", "Written by ", tag("code", "slimdiff report"), " from results alone."),
        tag("script", _resource("page.js")),
    )
    return f"<!doctype html>\n{tag('html', _head(results), body, lang='en')}\n"


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


def _header(results: Results) -> Html:
    unmeasured = (
        None if "cost" in results else missing("Cost and speed were not measured", EVALUATE)
    )
    return tag(
        "header",
        tag("button", "dark", type="button", id="theme", hidden=True),
        tag("p", "slimdiff report", class_="muted"),
        tag("h1", facts.title(results)),
        tag("p", _unbroken(facts.summary(results)), class_="summary"),
        figures.key_figures(results),
        unmeasured,
    )


def _unbroken(sentence: str) -> Html:
    """Text whose figures with an exponent stay on one line."""
    return Html(re.sub(r"[\d.]+e-\d+", r'<span class="figure">\g<0></span>', text(sentence)))


def _frontier(results: Results) -> dict[str, tuple[str, Html]]:
    """A section of its own, where there is one."""
    if "frontier" not in results:
        return {}
    told = (
        "Velocity error of plans from dense down to the smallest widths: the line is predicted, "
        "dots were measured on inputs that calibration kept, and the ring marks the knee."
    )
    charts = [_chart(name, frontier.drawing(results, axis)) for axis, name in frontier.AXES.items()]
    body = join((tag("p", told), tag("div", *charts, class_="charts")))
    return {"frontier": ("The frontier", body)}


def _images(results: Results) -> Html:
    images = results.get("images")
    if not images:
        return missing("No images were drawn", EVALUATE)
    told = (
        "The same prompts and the same seeds, through the dense pipeline and the slim one. In the "
        "difference, black is none."
    )
    return join((tag("p", told), gallery(images)))


def _where(results: Results) -> Html:
    if not facts.groups_of(results):
        return missing("No groups were recorded", COMPRESS)
    charts = [
        _chart(f"{name[0].upper()}{name[1:]}", plots.where_it_went(results, metric))
        for metric, name in facts.METRICS.items()
    ]
    return join(
        (
            tag("p", "Each pair of bars is dense (pale) above slim (full). ", _legend(results)),
            tag("div", *charts, class_="charts"),
            tables.where_it_went(results),
        )
    )


def _legend(results: Results) -> Html:
    groups = facts.groups_of(results)
    kinds = facts.kinds_of(groups)
    entries = [
        (f"var(--kind-{number % 4})", facts.kind_name(kind)) for number, kind in enumerate(kinds)
    ]
    entries += [("var(--rest)", facts.kind_name("rest"))] if "rest" in results else []
    return tag("span", *(tag("span", _swatch(c), name) for c, name in entries), class_="legend")


def _swatch(colour: str) -> Html:
    return tag("i", style=f"background:{colour}")


def _chart(caption: object, drawing: Html, wide: bool = False) -> Html:
    shown = scrolling(drawing, "Plot, scrolls sideways") if wide else drawing
    return tag("figure", tag("figcaption", caption), shown, class_="chart")


def _plan(results: Results) -> Html:
    pairs = facts.plan_facts(results)
    spans = [tag("span", f"{name} ", tag("b", value)) for name, value in pairs.items()]
    told = tag("p", *spans, class_="told") if pairs else missing("No plan was given", COMPRESS)
    if not facts.groups_of(results):
        return told
    caption = (
        "Width of every group along the network: outlined what the dense model has, filled what "
        "stays. Groups of one block stand side by side, in the order of its layers."
    )
    return join((told, _chart(caption, plots.plan(results), wide=True)))


def _curves(results: Results) -> Html:
    groups = [group for group in facts.groups_of(results) if group.get("curve")]
    charts = [
        _chart(facts.kind_name(kind), drawing)
        for kind in facts.kinds_of(groups)
        if (drawing := lines.curves(results, kind))
    ]
    if not charts:
        return missing("No error curves were recorded", COMPRESS)
    whose = "denoiser's" if any(g.get("gain") is not None for g in groups) else "group's own"
    told = (
        f"Predicted relative squared error of the {whose} output, by the share of its width that a "
        f"group keeps. One line for each group; the dot is the width that was chosen. A group "
        f"that keeps all of its width has no error and no dot."
    )
    return join((tag("p", told), tag("div", *charts, class_="charts thirds")))


def _error(results: Results) -> Html:
    drawings = {
        "By timestep": lines.by_timestep(results),
        "By number of calibration prompts": lines.by_prompts(results),
    }
    charts = [_chart(caption, drawing) for caption, drawing in drawings.items() if drawing]
    told = (
        "Squared difference of slim and dense predictions over the square of the dense ones, on "
        "the inputs that the dense pipeline's own sampling passes through."
    )
    if not charts:
        if facts.measured(results, "fidelity", "velocity"):
            return tag("p", "None: every prediction is as it was.")
        return missing("Velocity error was not measured", EVALUATE)
    return join((tag("p", told), tag("div", *charts, class_="charts")))


def _measured(results: Results) -> dict[str, tuple[str, Html]]:
    """What `evaluate` adds; one line that says so where nothing of it is there."""
    if any(name in results for name in ("fidelity", "cost", "prompt_counts")):
        return {
            "error": ("Velocity error", _error(results)),
            "figures": ("All figures", _figures(results)),
        }
    told = "Velocity error, likeness of the images, time and memory were not measured"
    return {"figures": ("All figures", missing(told, EVALUATE))}


def _figures(results: Results) -> Html:
    parts = [("fidelity", "Fidelity was not measured"), ("cost", "Cost was not measured")]
    lines_told = [missing(told, EVALUATE) for name, told in parts if not results.get(name)]
    table = figures.figures(results) if len(lines_told) < len(parts) else None
    return join((table, *lines_told))


def _groups(results: Results) -> Html:
    found = facts.groups_of(results)
    return tables.groups(results) if found else missing("No groups were recorded", COMPRESS)


def _made(results: Results) -> Html:
    parts = made_of(results)
    if not parts:
        return missing("How these results were made is not known", COMPRESS)
    return join((made(results), tag("h3", "To repeat it"), to_repeat(parts)))
