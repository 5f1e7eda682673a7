"""How results were made, and what to type to make them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimdiff.report import numbers
from slimdiff.report.html import Html, join, tag
from slimdiff.report.names import stage_told
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
    if took := _stages(figures):
        calibration |= {"took": took}
    if calibration:
        parts += [tag("h3", "Calibration and compression"), _facts(calibration)]
    return join(parts)


def _stages(figures: Mapping[str, Any]) -> dict[str, str]:
    """Stage -> what it took."""
    found = {}
    for stage, seconds in (figures.get("seconds") or {}).items():
        told = stage_told(stage, numbers.duration(seconds), figures.get("reused", ()))
        found[stage] = " and ".join(part for part in told if part)
    return found


def _facts(pairs: Mapping[str, Any]) -> Html:
    rows = [
        tag("div", tag("dt", key.replace("_", " ")), tag("dd", _value(key, value)))
        for key, value in pairs.items()
        if value is not None and key != "call"  # which is shown below, to be repeated
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
    """Commands and Python calls, with the versions that they ran with."""
    lines: list[str] = []
    known, before = "", ""
    for part in (part for part in parts if "call" in part or "command" in part):
        language = "in Python" if "call" in part else "in a shell"
        lines += [""] if before not in ("", language) else []
        told = _versions(part)
        lines += [f"# {told}"] if told and told != known else []
        if "call" in part:
            lines += [f"# {language}, with a list of {part['prompts']} prompts", part["call"]]
        else:
            lines += [f"# {language}"] if before not in ("", language) else []
            lines.append(str(part["command"]))
        known, before = told, language
    return tag("pre", tag("code", "\n".join(lines)), tabindex="0")


def _versions(part: Made) -> str:
    versions = dict(part.get("versions") or {})
    versions |= {"python": part["python"]} if "python" in part else {}
    return ", ".join(f"{name} {version}" for name, version in versions.items())
