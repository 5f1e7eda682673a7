"""The command line: a thin shell over slimdiff's functions."""

from __future__ import annotations

import sys
from typing import Annotated, cast

import typer

from slimdiff.cli import compress, console, data, evaluate, images, inspect, measure, report
from slimdiff.errors import SlimdiffError

HELP = """Compress diffusers pipelines in closed form, without training.

MODEL is a diffusers folder, a hub id, or the name of a bundled reference; without it, the bundled
reference `scenes-unet` is used. Each command's `--help` has examples.

- `slimdiff compress` makes a smaller pipeline
- `slimdiff frontier` shows what every budget would cost
- `slimdiff compare scenes-unet scenes-unet-slim` draws the same seeds with both
- `slimdiff evaluate scenes-unet scenes-unet-slim` measures what was lost and gained
- `slimdiff report RESULTS...` makes a page of what both wrote
"""

# The base of all usage errors, whichever library typer takes it from.
UsageError = cast(type[Exception], typer.BadParameter.__mro__[2])

app = typer.Typer(
    name="slimdiff",
    help=HELP,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("compress", help=compress.HELP)(compress.compress)
app.command("inspect", help=inspect.HELP)(inspect.inspect)
app.command("generate", help=images.GENERATE)(images.generate)
app.command("compare", help=images.COMPARE)(images.compare)
app.command("evaluate", help=evaluate.HELP)(evaluate.evaluate)
app.command("report", help=report.HELP)(report.report)
app.command("frontier", help=measure.FRONTIER)(measure.frontier)
app.command("profile", help=measure.PROFILE)(measure.profile)
app.command("select-prompts", help=data.SELECT)(data.select_prompts)
app.add_typer(data.statistics, name="statistics", help="Show or add up recorded statistics.")


def _version(asked: bool) -> None:
    if asked:
        from slimdiff import __version__

        console.out().print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show notes, and what other libraries say.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    console.set_verbosity(verbose)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's error is one line on stderr and exit code 2."""
    try:
        code = app(arguments, prog_name="slimdiff", standalone_mode=False)
    except SlimdiffError as error:
        code = console.fail(str(error))
    except UsageError as error:
        code = console.fail(error.format_message())  # type: ignore[attr-defined]  # as click has it
    except OSError as error:
        if error.filename is None:
            raise
        code = console.fail(f"{error.filename}: {error.strerror}")
    except (KeyboardInterrupt, typer.Abort):
        console.fail("interrupted")
        code = 130
    sys.exit(code)
