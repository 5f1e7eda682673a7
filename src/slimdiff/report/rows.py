"""All figures of fidelity and cost as rows of text: the page and the terminal show the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from slimdiff.report import numbers
from slimdiff.report.names import FIGURES

Found = Mapping[str, Any]
Values = Callable[[Found], tuple[str, str]]


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: what it is called.
        dense, slim: its values; empty where there is none.
        note: what it was measured on.
        reason: why it was not measured; None if it was.
        detail: whether it is a part of the figure above.
    """

    name: str
    dense: str = ""
    slim: str = ""
    note: str = ""
    reason: str | None = None
    detail: bool = False


def fidelity(found: Found) -> Iterator[Row]:
    """How alike predictions and images are; `found` is that section of results."""
    images = found.get("images")
    yield from _row(
        "velocity", found.get("velocity"), lambda v: ("0", numbers.error(v["relative"]))
    )
    yield from _left_out(found.get("pictures") or {})
    yield from _row("psnr", images, lambda v: ("", f"{v['psnr']:.1f}{numbers.SPACE}dB"))
    yield from _row("ssim", images, lambda v: ("", f"{v['ssim']:.4f}"))
    yield from _row("frechet", found.get("frechet"), _distance, _of_enough)
    yield from _row("kernel", found.get("kernel"), _distance)
    yield from _row("clip", found.get("clip"), _both(lambda score: f"{score:.2f}"))
    scenes = found.get("scenes") or {}
    yield from _row("scenes", found.get("scenes"), _both(_whole), _judged)
    attributes = scenes["slim"].get("attributes", {}) if "slim" in scenes else {}
    for name in (name for name in attributes if name != "whole"):
        dense, slim = (_accuracy(scenes[model]["attributes"][name]) for model in ("dense", "slim"))
        yield Row(name, dense, slim, detail=True)


def _left_out(pictures: Found) -> Iterator[Row]:
    """Pictures that nothing is measured on, where there are any."""
    out = pictures.get("left_out", {})
    if "unavailable" in pictures or any(count for own in out.values() for count in own.values()):
        yield from _row("pictures", pictures, _out_of_each, _why_left_out)


def _out_of_each(pictures: Found) -> tuple[str, str]:
    dense, slim = (sum(pictures["left_out"][model].values()) for model in ("dense", "slim"))
    return str(dense), str(slim)


def _why_left_out(pictures: Found) -> str:
    kinds = {kind for own in pictures["left_out"].values() for kind in own if own[kind]}
    told = ", ".join(sorted(kind.replace("_", " ") for kind in kinds))
    return f"{told}; {pictures['measured']} of {pictures['drawn']} pairs are measured"


def cost(found: Found) -> Iterator[Row]:
    """What the models take; `found` is that section of results."""
    for key, written in (
        ("params", "{:,}".format),
        ("macs", "{:,}".format),
        ("bytes", numbers.size),
        ("peak_memory", numbers.size),
    ):
        yield from _row(key, found.get(key), _both(written), _removed)
    latency = found.get("latency") or {}
    for key in ("denoiser", "pipeline"):
        where = latency if "unavailable" in latency else latency.get(key)
        yield from _row(key, where, _both(numbers.duration), _timing)
    for key, told in (("macs_allow", numbers.times), ("share_reached", numbers.percent)):
        if key in found:
            yield Row(FIGURES[key], slim=told(found[key]))


def _both(written: Callable[[Any], str]) -> Values:
    return lambda found: (written(found["dense"]), written(found["slim"]))


def _distance(found: Found) -> tuple[str, str]:
    return "", numbers.short(found["value"])


def _whole(scenes: Found) -> str:
    return _accuracy({"share": scenes["whole"], "interval": scenes["interval"]})


def _accuracy(found: Found) -> str:
    return f"{numbers.percent(found['share'])} ({numbers.interval(found['interval'])})"


def _judged(scenes: Found) -> str:
    return f"{scenes['slim']['count']} images; 95{numbers.SPACE}% intervals"


def _details(found: Found) -> str:
    """What a figure was measured on."""
    parts = [
        f"{found[key]} {key if key == 'prompts' else 'images'}"
        for key in ("prompts", "count")
        if key in found
    ]
    return ", ".join(
        parts + [f"{key}: {found[key]}" for key in ("features", "model") if key in found]
    )


def _of_enough(found: Found) -> str:
    """A Fréchet distance fits a covariance, which takes more images than features."""
    count, features = found.get("count", 0), found.get("dimensions", 0)
    doubt = f"; unreliable: fewer images than features ({features})" if count < features else ""
    return _details(found) + doubt


def _removed(found: Found) -> str:
    return numbers.removed(found["dense"], found["slim"])


def _timing(found: Found) -> str:
    parts = [numbers.faster(found["speedup"])] if "speedup" in found else []
    parts += [str(found["of"])] if "of" in found else []
    parts += [f"{found['runs']} run{'s' * (found['runs'] != 1)}"] if "runs" in found else []
    return ", ".join(parts)


def _row(
    key: str, found: Found | None, values: Values, note: Callable[[Found], str] = _details
) -> Iterator[Row]:
    """A row, if the figure is known; with the reason, if it could not be measured."""
    if found is None:
        return
    if "unavailable" in found:
        yield Row(FIGURES[key], reason=str(found["unavailable"]))
    else:
        yield Row(FIGURES[key], *values(found), note(found))
