"""How results were made, and what to type to make them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimdiff.report import numbers
from slimdiff.report.html import Html, join, tag
from slimdiff.results import Results

Made = Mapping[str, Any]


def made_of(results: Results) -> list[Made]:
    """How each part of the results came about."""
    made = results.get("made") or []
    return [made] if isinstance(made, Mapping) else list(made)


def made(results: Results) -> Html:
    """A list of facts for each part of the results, and one for the calibration."""
    parts = [_facts(part) for part in made_of(results)]
    figures = (results.get("plan") or {}).get("figures") or {}
    told = [value for part in made_of(results) for value in part.values()]
    found = figures.get("calibration") or {}
    calibration = {key: value for key, value in found.items() if value not in told}
    if seconds := figures.get("seconds"):
        kept = {stage: ", reused what was kept" for stage in figures.get("reused", ())}
        took = {
            stage: f"{numbers.duration(s)}{kept.get(stage, '')}" for stage, s in seconds.items()
        }
        calibration |= {"took": took}
    if calibration:
        parts += [tag("h3", "Calibration and compression"), _facts(calibration)]
    return join(parts)


def _facts(pairs: Mapping[str, Any]) -> Html:
    rows = [
        tag("div", tag("dt", key.replace("_", " ")), tag("dd", _value(key, value)))
        for key, value in pairs.items()
        if value is not None
    ]
    return tag("dl", *rows, class_="made")


def _value(key: str, value: object) -> object:
    if key == "command":
        return tag("code", value)
    if isinstance(value, Mapping):
        pairs = [(name.replace("_", " "), inner) for name, inner in value.items()]
        return ", ".join(f"{name} {_value('', v)}" for name, v in pairs if v is not None)
    if isinstance(value, list | tuple):
        return ", ".join(str(_value("", inner)) for inner in value)
    return value


def to_repeat(parts: Sequence[Made]) -> Html:
    """The commands, with the versions that they ran with."""
    lines: list[str] = []
    known = ""
    for part in (part for part in parts if "command" in part):
        versions = dict(part.get("versions") or {})
        versions |= {"python": part["python"]} if "python" in part else {}
        told = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines += [f"# {told}"] if told and told != known else []
        lines.append(str(part["command"]))
        known = told
    return tag("pre", tag("code", "\n".join(lines)), tabindex="0")
