"""`slimdiff report`: results as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimdiff import results
from slimdiff.cli import console

HELP = """Write results as one HTML file: what was removed, what it cost, how to repeat it.

RESULTS are JSON files that slimdiff wrote. Several of the same model add up: of what more than one
has measured, the last one's is shown. The file loads nothing from the network and runs no code but
its own, so it can be sent and kept. Needs matplotlib: `pip install 'slimdiff[plot]'`.

**Examples**

- `slimdiff report results.json`
- `slimdiff report compress.json evaluate.json -o slim.html`
"""

Files = Annotated[
    list[Path], typer.Argument(help="Files of results, all of one model.", metavar="RESULTS")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")]


def report(files: Files, out: Out = Path("report.html")) -> None:
    """Render results; `HELP` is what the command line shows."""
    found = results.merged(results.read(file) for file in files)
    from slimdiff.report import write_report

    write_report(found, out)
    size = out.stat().st_size // 1000
    sources = ", ".join(file.name for file in files)
    console.out().print(f"{out}: {size} kB from {sources}", soft_wrap=True, markup=False)
