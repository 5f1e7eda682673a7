"""What benchmark scripts share: timed stages with their peak memory, the machine, and JSON."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import slimdiff

HERE = Path(__file__).parent
RESULTS = HERE / "results"


class Stages:
    """Seconds and peak memory of each stage of one process (Linux)."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}
        self.base_gib = 0.0

    def model_is_built(self) -> None:
        """Count memory from here on: what the process holds now is the model."""
        self.base_gib = _status_gib("VmRSS")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and note the peak above the model while it ran."""
        Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        yield
        row = {
            "seconds": round(time.perf_counter() - start, 1),
            "peak_above_model_gib": round(_status_gib("VmHWM") - self.base_gib, 2),
        }
        self.rows[name] = row
        figures = f"{row['seconds']:8.1f} s {row['peak_above_model_gib']:7.2f} GiB"
        print(f"{name:12s} {figures}", flush=True)


def _status_gib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 2**20
    raise KeyError(key)


class Rows:
    """Rows of one benchmark in one JSON file, written after each, so that a killed run goes on.

    Several processes may share the work: each looks into the file before it measures a row. Rows
    that were measured with other settings do not count and are measured again.
    """

    def __init__(self, name: str, settings: dict[str, Any], folder: Path = RESULTS) -> None:
        self.path = folder / f"{name}.json"
        self.settings = json.loads(json.dumps(settings))

    @property
    def result(self) -> dict[str, Any]:
        """What the file holds, if it is of these settings."""
        kept = json.loads(self.path.read_text()) if self.path.is_file() else {}
        return kept if kept.get("settings") == self.settings else {"rows": {}}

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Name -> row, of all that are there."""
        return self.result["rows"]

    def measure(self, key: str, make: Callable[[], dict[str, Any]]) -> None:
        """Measure a row, unless it is there."""
        if key in self.rows:
            print(f"{key}: kept", flush=True)
            return
        row = make()
        shown = {name: value for name, value in row.items() if not isinstance(value, list)}
        print(f"{key}: {shown}", flush=True)
        rows = self.rows | {key: row}
        data = {"machine": machine(), "settings": self.settings, "rows": rows}
        partial = self.path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(data, indent=1) + "\n")
        partial.replace(self.path)


def peak_of(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, its seconds, and the most MiB that the process grew by meanwhile."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what earlier calls freed would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _status_gib("VmRSS"), time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    return result, round(seconds, 1), round(1024 * (_status_gib("VmHWM") - before), 1)


def machine() -> dict[str, Any]:
    """What the figures were measured on, and the command that measured them."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "command": command(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "slimdiff": slimdiff.__version__,
    }


def command() -> str:
    """The command that gives a whole result anywhere.

    Left out are the folder that things lie in here, and which part of the rows this process took.
    """
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--work", "--only", "--profiles"):
        ours.add_argument(option)
    ours.add_argument("--backwards", action="store_true")
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(HERE.parent) if script.is_relative_to(HERE.parent) else script
    return shlex.join(["python", str(name), *ours.parse_known_args(sys.argv[1:])[1]])


def write(name: str, result: dict[str, Any]) -> Path:
    """Write a result beside the others."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine()} | result, indent=1) + "\n")
    print(f"wrote {path}")
    return path
