"""What all commands share: messages, quiet libraries and progress bars."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

FILE_WIDTH = 140


def out() -> Console:
    """Where results go: stdout, as wide as the terminal, or wide enough for a file."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if known else FILE_WIDTH)


def fail(message: str) -> int:
    """Write one line to stderr and return the exit code of a user's error."""
    sys.stderr.write(f"slimdiff: error: {' '.join(message.split())}\n")
    return 2


def set_verbosity(verbose: bool) -> None:
    """Show slimdiff's warnings, with `verbose` its notes and what other libraries say too."""
    logging.basicConfig(format="slimdiff: %(message)s", level=logging.ERROR)
    logging.getLogger("slimdiff").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:
        warnings.simplefilter("ignore")


def is_verbose() -> bool:
    """Whether other libraries may speak too."""
    return logging.getLogger("slimdiff").level == logging.INFO


def quiet_libraries() -> None:
    """No progress bars, warnings or advice from diffusers and transformers.

    Called where a command imports them, unless slimdiff is verbose.
    """
    if is_verbose():
        return
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    for library in (diffusers, transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()


class Bars:
    """Progress bars with the time left, one per stage, on stderr; is itself the callback."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done in `stage`."""
        self._progress.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, completed=done)
        else:
            self._progress.update(self._tasks[stage], completed=done, total=total)

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._tasks:
            self._progress.stop()


def count(number: float) -> str:
    """A count with a unit: 9850000 as 9.85 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def share(part: float, whole: float) -> str:
    """A share in percent."""
    return f"{100 * part / whole:.1f} %"


def table(title: str, columns: dict[str, Any]) -> Any:
    """An empty rich table; `columns` maps headers to `left` or `right`. The first one folds."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for header, justify in columns.items():
        first = not made.columns
        made.add_column(header, justify=justify, no_wrap=not first, overflow="fold")
    return made
