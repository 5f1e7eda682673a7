"""Results: what was measured, as JSON that the report renders and that outlives this version.

One schema for all: a file holds any of the sections below, and several files of the same model add
up (`merged`), so that `compress` and `evaluate` each write what they know.

- `made`: command (of a shell) or call (of Python), date, versions, machine, threads, dtype;
  `made_by` gives it.
- `model`: {"dense", "slim", "class"}: names, and the class of the denoiser.
- `plan`: {"recipe", "allocation", "budget", "figures"}; the figures have "seconds" by stage, and
  "reused": the stages that found what they were to make.
- `groups`: a list of {"name", "kind", "block", "layer", "width", "dense_width", "heads",
  "dense_heads", "params", "params_dense", "macs", "macs_dense", "gain", "curve": {"widths": [...],
  "errors": [...]}}; `curve` is the predicted relative squared error of the denoiser's output (of
  the group's own output where `gain` is None) with the heads that stay, or None where the recipe
  has none.
- `rest`: {"params", "macs"} of everything that is in no group.
- `fidelity`: {"velocity": {"relative", "by_timestep": [[timestep, error], ...], "prompts"},
  "pictures": {"drawn", "measured": pairs, "left_out": {"dense" and "slim": {"not_finite",
  "flagged", "black"}}, "drawn_without": names of components}, "images": {"psnr", "ssim", "count"},
  "frechet" and "kernel": {"value", "features", "count", "dimensions"}, "clip": {"dense", "slim",
  "model", "count"}, "scenes": {"dense": S, "slim": S}}
  with S = {"whole", "interval": [low, high], "attributes": {name: {"share", "interval"}}, "count"};
  a metric that could not be measured is {"unavailable": reason}.
- `cost`: {"params", "macs", "bytes", "peak_memory": each {"dense", "slim"}, "latency": {"denoiser"
  and "pipeline": {"dense", "slim", "speedup", "runs", "of"}}, "macs_allow", "share_reached"};
  bytes, seconds, parameters and MACs as they are; `macs_allow` is the speed-up that the ratio of
  MACs allows, and `share_reached` the measured denoiser speed-up over it.
- `images`: a list of {"prompt", "seed", "dense", "slim"}, images as base64 PNG.
- `frontier`: {"dense": P, "metric", "points": [P, ...], "knee"} with P = {"params", "macs",
  "predicted", "measured"}; errors relative as above, `measured` None where it was not.
- `prompt_counts`: a list of {"prompts", "velocity_error"}: error by size of the calibration set.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from slimdiff.errors import SlimdiffError

SCHEMA, VERSION = "slimdiff.results", 1
SECTIONS = (
    "made",
    "model",
    "plan",
    "groups",
    "rest",
    "fidelity",
    "cost",
    "images",
    "frontier",
    "prompt_counts",
)
PACKAGES = ("slimdiff", "torch", "diffusers", "transformers")

Results = dict[str, Any]


def made_by(call: str | None = None, **more: Any) -> dict[str, Any]:
    """How results came about: the command, when, on what, with which versions, and `more`.

    Where no command of slimdiff's runs, the Python `call` says what to repeat.
    """
    name, typed = _command()
    by_hand = call is not None and name != "slimdiff"
    return {
        **({"call": call} if by_hand else {"command": typed}),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": processor(),
        "threads": torch.get_num_threads(),
    } | more


def _command() -> tuple[str, str]:
    """The program's name, and what was typed, or as near as it can be told."""
    path = Path(sys.argv[0])
    if path.parts[-2:] == ("slimdiff", "__main__.py"):
        return "slimdiff", shlex.join(["python", "-m", "slimdiff", *sys.argv[1:]])
    name = path.name or "python"
    python = ["python"] if name.endswith(".py") else []
    return path.stem, shlex.join([*python, name, *sys.argv[1:]])


def called(module: str, function: str, given: Sequence[str], **settings: Any) -> str:
    """A Python call as one would type it, with the imports that it needs.

    Args:
        module: what the function is imported from.
        function: its name.
        given: arguments that can only be named, such as `pipe`.
        settings: arguments that are shown by value; those that are None are left out.
    """
    shown = {key: value for key, value in settings.items() if value is not None}
    types = {type(value).__name__ for value in shown.values() if is_dataclass(value)}
    arguments = [*given, *(f"{key}={_literal(value)}" for key, value in shown.items())]
    lines = "".join(f"    {argument},\n" for argument in arguments)
    return f"from {module} import {', '.join(sorted({function, *types}))}\n\n{function}(\n{lines})"


def _literal(value: Any) -> str:
    """A value in Python; of a dataclass, the fields that are not None."""
    if not is_dataclass(value):
        return repr(value)
    pairs = ((field.name, getattr(value, field.name)) for field in fields(value))
    told = ", ".join(f"{name}={inner!r}" for name, inner in pairs if inner is not None)
    return f"{type(value).__name__}({told})"


def processor() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def write(path: str | Path, results: Mapping[str, Any]) -> Path:
    """Write results as JSON, atomically.

    Raises:
        ValueError: a section that the schema does not know.
    """
    path = Path(path)
    if unknown := set(results) - set(SECTIONS):
        raise ValueError(f"results have no sections {sorted(unknown)}; known: {SECTIONS}")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(
        json.dumps({"schema": SCHEMA, "version": VERSION, **results}, indent=1) + "\n"
    )
    partial.replace(path)
    return path


def read(path: str | Path) -> Results:
    """The sections of a results file.

    Raises:
        SlimdiffError: no such file, not results, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise SlimdiffError(f"{path}: no such file; expected results that slimdiff wrote")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SlimdiffError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise SlimdiffError(
            f'{path}: not results of slimdiff (no "schema": "{SCHEMA}"); expected what '
            f"`slimdiff evaluate` or `slimdiff compress` wrote"
        )
    if data.get("version") != VERSION:
        raise SlimdiffError(
            f"{path}: results version {data.get('version')}, this slimdiff reads {VERSION}; "
            f"upgrade slimdiff"
        )
    return {name: data[name] for name in SECTIONS if name in data}


def merged(parts: Iterable[Results]) -> Results:
    """The sections of all parts; of a section that several have, the last one's.

    Error curves and gains, which only a compression knows, stay with their groups; `made` becomes
    a list, so that every part says how it came about.

    Raises:
        SlimdiffError: nothing to merge, or results of different models.
    """
    parts = list(parts)
    if not parts:
        raise SlimdiffError("no results: give at least one file")
    whole: Results = {}
    for part in parts:
        classes = {p["model"]["class"] for p in (whole, part) if "model" in p}
        if len(classes) > 1:
            raise SlimdiffError(
                f"results of different models do not add up: {' and '.join(sorted(classes))}"
            )
        _refuse_other_widths(whole, part)
        whole |= part | _with_curves(part.get("groups"), whole.get("groups"))
    whole["made"] = [part["made"] for part in parts if "made" in part]
    return whole


def _refuse_other_widths(whole: Results, part: Results) -> None:
    sizes = [
        {row["name"]: (row["heads"], row["width"]) for row in results["groups"]}
        for results in (whole, part)
        if "groups" in results
    ]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        names = [results.get("model", {}).get("slim", "?") for results in (whole, part)]
        differ = [name for name in sizes[0] if sizes[0][name] != sizes[1].get(name)]
        raise SlimdiffError(
            f"results of {names[0]} and of {names[1]} do not add up: widths differ, for instance "
            f"of {differ[0] if differ else 'other groups'}; give the results of one slim model"
        )


def _with_curves(rows: list[Any] | None, earlier: list[Any] | None) -> dict[str, Any]:
    """The rows of groups, with the curves that earlier rows have of them."""
    if rows is None or earlier is None:
        return {}
    known = {row["name"]: row for row in earlier}
    return {
        "groups": [
            row | {key: known[row["name"]][key] for key in ("curve", "gain")}
            if row.get("curve") is None and row["name"] in known
            else row
            for row in rows
        ]
    }
