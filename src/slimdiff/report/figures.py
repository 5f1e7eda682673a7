"""The report's figures: the few at the top, and the table of all of them."""

from __future__ import annotations

from collections.abc import Iterator

from slimdiff.report import numbers, rows
from slimdiff.report.facts import measured, timing, total
from slimdiff.report.html import Html, join, table, tag
from slimdiff.report.names import METRICS, figure_name
from slimdiff.results import Results

Card = tuple[str, str, str]


def key_figures(results: Results) -> Html:
    """The few figures that a hurried reader looks for."""
    cards = [*_sizes(results), *_speed(results), *_likeness(results)]
    plan = measured(results, "plan", "figures") or {}
    return tag("dl", *(_card(figure_name(key, plan), *told) for key, *told in cards))


def _sizes(results: Results) -> Iterator[Card]:
    for metric in METRICS:
        if pair := total(results, metric):
            change = numbers.change(numbers.count(pair.dense), numbers.count(pair.slim))
            yield metric, change, numbers.removed(pair.dense, pair.slim)


def _speed(results: Results) -> Iterator[Card]:
    if found := timing(results):
        seconds = (numbers.duration(found[model]) for model in ("dense", "slim"))
        allowed = measured(results, "cost", "macs_allow")
        reached = measured(results, "cost", "share_reached")
        note = numbers.faster(found["speedup"])
        note += f"; the MACs allow {numbers.times(allowed)}" if allowed else ""
        note += f" ({numbers.percent(reached)} reached)" if reached else ""
        yield "denoiser", numbers.change(*seconds), note


def _likeness(results: Results) -> Iterator[Card]:
    told = "relative and squared; dense is 0"
    if (error := measured(results, "fidelity", "velocity", "relative")) is not None:
        yield "velocity", numbers.error(error), told
    elif (error := measured(results, "plan", "figures", "error_on_probes")) is not None:
        yield "error_on_probes", numbers.error(error), told
    if (psnr := measured(results, "fidelity", "images", "psnr")) is not None:
        yield "psnr", f"{psnr:.1f}{numbers.SPACE}dB", "the same prompts and seeds"
    if scenes := measured(results, "fidelity", "scenes"):
        shares = (numbers.percent(scenes[model]["whole"]) for model in ("dense", "slim"))
        interval = numbers.interval(scenes["slim"]["interval"])
        note = f"slim, 95{numbers.SPACE}% interval: {interval}"
        yield "scenes", numbers.ARROW.join(shares), note


def _card(name: str, value: str, note: str) -> Html:
    return tag("div", tag("dt", name), tag("dd", value), tag("dd", note, class_="note"))


def figures(results: Results) -> Html | None:
    """All figures of fidelity and cost; what could not be measured, with the reason."""
    parts = {"fidelity": ("Fidelity", rows.fidelity), "cost": ("Cost", rows.cost)}
    found: list[list[object]] = []
    for key, (title, rows_of) in parts.items():
        if section := results.get(key):
            found += [[title], *(_cells(row) for row in rows_of(section))]
    return (
        table(("", "Dense", "Slim", ""), found, "Figures of fidelity and cost") if found else None
    )


def _cells(row: rows.Row) -> list[object]:
    name = tag("span", row.name, class_="sub") if row.detail else row.name
    if row.reason is not None:
        return [name, "", tag("span", "not measured", class_="muted"), row.reason]
    return [name, _value(row.dense), _value(row.slim), row.note]


def _value(told: str) -> Html:
    """A value, with the interval behind it in small."""
    value, bracket, interval = told.partition(" (")
    return join((value, tag("small", f"({interval}") if bracket else None), " ")
