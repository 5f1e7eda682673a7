"""The report: one HTML file that tells what was removed, what it cost and how to repeat it.

It is rendered from results alone (`slimdiff.results`), loads nothing from anywhere, and the same
results give the same bytes.
"""

from __future__ import annotations

import os
from pathlib import Path

from slimdiff.errors import SlimdiffError
from slimdiff.report.page import render
from slimdiff.results import Results

__all__ = ["render", "write_report"]


def write_report(results: Results, path: str | Path) -> Path:
    """Render results and write them to `path`, atomically.

    Raises:
        SlimdiffError: `path` is a folder, results lack what the schema asks for, or matplotlib is
            not installed.
    """
    path = Path(path)
    if path.is_dir():
        raise SlimdiffError(f"{path}: is a folder; expected the name of an HTML file")
    page = render(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path
