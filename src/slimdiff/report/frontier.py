"""The report's frontier: velocity error against size, and against the speed that MACs allow."""

from __future__ import annotations

from typing import Any

from slimdiff.report import numbers
from slimdiff.report.html import Html
from slimdiff.report.lines import ERROR_FLOOR, LARGE, label_errors, log_axis
from slimdiff.report.names import FIGURES
from slimdiff.report.svg import COLOURS, Tooltips, drawn
from slimdiff.results import Results

AXES = {"params": "Velocity error against parameters", "macs": "Velocity error against speed"}


def drawing(results: Results, axis_of: str) -> Html:
    """The curve against `params` (the share that stays) or `macs` (how much faster they allow)."""
    found = results["frontier"]
    points = [point for point in found["points"] if point["predicted"] > ERROR_FLOOR]
    knee = found["points"][found["knee"]]

    def paint(figure: Any) -> Tooltips:
        axis = log_axis(figure)
        accent, tooltips = COLOURS["accent"], {}
        x = [_place(found, point, axis_of) for point in points]
        axis.plot(x, [point["predicted"] for point in points], color=accent, linewidth=1.6)
        for number, point in enumerate(p for p in points if p["measured"]):
            at, gid = _place(found, point, axis_of), f"m{number}"
            axis.plot([at], [point["measured"]], "o", markersize=6, color=accent, gid=gid)
            told = f"{numbers.error(point['measured'])}, predicted"
            tooltips[gid] = f"measured {told} {numbers.error(point['predicted'])}"
        at = _place(found, knee, axis_of)
        ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": COLOURS["muted"]}
        axis.plot([at], [knee["predicted"]], "o", gid="knee", **ring)
        tooltips["knee"] = f"knee: {_told(axis_of, at)}, {numbers.error(knee['predicted'])}"
        label_errors(axis)
        axis.xaxis.set_major_formatter(lambda value, _: _told(axis_of, value))
        if axis_of == "params":
            axis.invert_xaxis()
        name = "parameters that stay" if axis_of == "params" else FIGURES["macs_allow"]
        axis.set_xlabel(name)
        return tooltips

    return drawn(f"frontier-{axis_of}", AXES[axis_of], LARGE, paint)


def _place(found: dict[str, Any], point: dict[str, Any], axis_of: str) -> float:
    if axis_of == "params":
        return float(point["params"] / found["dense"]["params"])
    return float(found["dense"]["macs"] / point["macs"])


def _told(axis_of: str, value: float) -> str:
    return numbers.percent(value) if axis_of == "params" else numbers.times(value)
