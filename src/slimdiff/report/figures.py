"""The report's figures: the few at the top, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from slimdiff.report import numbers
from slimdiff.report.facts import METRICS, Pair, measured, total
from slimdiff.report.html import Html, join, table, tag
from slimdiff.results import Results

Row = list[object]
Format = Callable[[Any], str]


def key_figures(results: Results) -> Html:
    """The few figures that a hurried reader looks for."""
    cards = [
        (name, numbers.change(numbers.count(pair.dense), numbers.count(pair.slim)), _less(pair))
        for metric, name in METRICS.items()
        if (pair := total(results, metric))
    ]
    return tag("dl", *(_card(*card) for card in [*cards, *_speed(results), *_likeness(results)]))


def _speed(results: Results) -> Iterator[tuple[str, str, str]]:
    latency = measured(results, "cost", "latency", "denoiser")
    if latency:
        seconds = (numbers.duration(latency[model]) for model in ("dense", "slim"))
        allowed = measured(results, "cost", "macs_allow")
        reached = measured(results, "cost", "share_reached")
        note = f"{numbers.times(latency['speedup'])} as fast"
        note += f"; the MACs allow {numbers.times(allowed)}" if allowed else ""
        note += f" ({numbers.percent(reached)} reached)" if reached else ""
        yield "time of one call", numbers.change(*seconds), note


def _likeness(results: Results) -> Iterator[tuple[str, str, str]]:
    if (error := measured(results, "fidelity", "velocity", "relative")) is not None:
        yield "velocity error", numbers.error(error), "relative and squared; dense is 0"
    if (psnr := measured(results, "fidelity", "images", "psnr")) is not None:
        yield "PSNR", f"{psnr:.1f}{numbers.SPACE}dB", "slim images to dense ones"
    if scenes := measured(results, "fidelity", "scenes"):
        shares = (numbers.percent(scenes[model]["whole"]) for model in ("dense", "slim"))
        interval = numbers.interval(scenes["slim"]["interval"])
        yield (
            "scenes drawn right",
            numbers.ARROW.join(shares),
            f"slim, 95{numbers.SPACE}% interval: {interval}",
        )


def _less(pair: Pair) -> str:
    return f"{numbers.percent(pair.removed)} removed"


def _card(name: str, value: str, note: str) -> Html:
    return tag("div", tag("dt", name), tag("dd", value), tag("dd", note, class_="note"))


def figures(results: Results) -> Html:
    """All figures of fidelity and cost; what could not be measured, with the reason."""
    fidelity, cost = results.get("fidelity"), results.get("cost")
    rows: list[Row] = [["Fidelity"], *_fidelity(fidelity)] if fidelity else []
    rows += [["Cost"], *_cost(cost)] if cost else []
    return table(("", "Dense", "Slim", ""), rows, "Figures of fidelity and cost")


def _fidelity(found: Mapping[str, Any]) -> Iterator[Row]:
    velocity, images = found.get("velocity"), found.get("images")
    yield from _row("velocity error", velocity, lambda v: ("0", numbers.error(v["relative"])))
    yield from _row("PSNR", images, lambda v: ("", f"{v['psnr']:.1f}{numbers.SPACE}dB"))
    yield from _row("SSIM", images, lambda v: ("", f"{v['ssim']:.4f}"))
    for key, name in (("frechet", "Fréchet distance"), ("kernel", "kernel distance")):
        yield from _row(name, found.get(key), lambda v: ("", f"{v['value']:.3g}"))
    clip = found.get("clip")
    yield from _row("CLIP score", clip, lambda v: (f"{v['dense']:.2f}", f"{v['slim']:.2f}"))
    scenes = found.get("scenes")
    yield from _row("scenes drawn right", scenes, _whole, _scene_count)
    if scenes and "dense" in scenes:
        for name in scenes["slim"].get("attributes", {}):
            pair = [_accuracy(scenes[m]["attributes"][name]) for m in ("dense", "slim")]
            yield [tag("span", name, class_="sub"), *pair, ""]


def _whole(scenes: Mapping[str, Any]) -> tuple[Html, Html]:
    dense, slim = (
        _accuracy({"share": scenes[m]["whole"], "interval": scenes[m]["interval"]})
        for m in ("dense", "slim")
    )
    return dense, slim


def _accuracy(found: Mapping[str, Any]) -> Html:
    interval = tag("small", f"({numbers.interval(found['interval'])})")
    return join((numbers.percent(found["share"]), interval), " ")


def _scene_count(scenes: Mapping[str, Any]) -> str:
    return f"{scenes['slim']['count']} images; 95{numbers.SPACE}% intervals"


def _details(found: Mapping[str, Any]) -> str:
    """What a figure was measured on."""
    parts = [
        f"{found[key]} {key if key == 'prompts' else 'images'}"
        for key in ("prompts", "count")
        if key in found
    ]
    parts += [f"{key}: {found[key]}" for key in ("features", "model") if key in found]
    few = found.get("count", 0) < found.get("dimensions", 0)
    return ", ".join(parts + ["too few images to rely on"] if few else parts)


def _cost(found: Mapping[str, Any]) -> Iterator[Row]:
    formats: dict[str, tuple[str, Format]] = {
        "params": ("parameters", lambda value: f"{value:,}"),
        "macs": ("MACs of one call", lambda value: f"{value:,}"),
        "bytes": ("size of the denoiser", numbers.size),
        "peak_memory": ("peak memory of one call", numbers.size),
    }
    for key, (name, written) in formats.items():
        yield from _row(name, found.get(key), _both(written), _ratio)
    latency = found.get("latency") or {}
    for key, name in (("denoiser", "time of one denoiser call"), ("pipeline", "time of an image")):
        where = latency if "unavailable" in latency else latency.get(key)
        yield from _row(name, where, _both(numbers.duration), _timing)
    if "macs_allow" in found:
        yield ["speed-up that the MACs allow", "", numbers.times(found["macs_allow"]), ""]
    if "share_reached" in found:
        yield ["share of it that was reached", "", numbers.percent(found["share_reached"]), ""]


def _both(written: Format) -> Callable[[Mapping[str, Any]], tuple[str, str]]:
    return lambda found: (written(found["dense"]), written(found["slim"]))


def _ratio(found: Mapping[str, Any]) -> str:
    return _less(Pair(found["dense"], found["slim"]))


def _timing(found: Mapping[str, Any]) -> str:
    parts = [f"{numbers.times(found['speedup'])} as fast"] if "speedup" in found else []
    parts += [str(found["of"])] if "of" in found else []
    parts += [f"{found['runs']} run{'s' * (found['runs'] != 1)}"] if "runs" in found else []
    return ", ".join(parts)


def _row(
    name: str,
    found: Mapping[str, Any] | None,
    values: Callable[[Mapping[str, Any]], tuple[object, object]],
    note: Callable[[Mapping[str, Any]], str] = _details,
) -> Iterator[Row]:
    """A row of dense, slim and what there is to note; the reason where nothing was measured."""
    if found is None:
        return
    if "unavailable" in found:
        yield [name, "", tag("span", "not measured", class_="muted"), str(found["unavailable"])]
    else:
        yield [name, *values(found), note(found)]
